"""The mathematics: every equation a pure function of tensors and callables, without a network.

    x_t = (1 - t) x0 + t eps        the path from a clean clip (t = 0) to noise (t = 1)
    v   = eps - x0                  the flow, which the networks predict
    x0  = x_t - t v                 the clean clip that a flow stands for

Clips are (b, f, c, h, w), times (b, f) in [0, 1], one per frame. A frame at t = 0 is conditioning
(the given image): networks see it clean, no loss is taken on it. "Paper" is AAD-1 (2606.03972).
"""
import math

import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- times, noise, conversions
def shift_time(t, shift):
    """t' = s t / (1 + (s - 1) t): shift > 1 moves times towards noise (SD3, 2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def schedule(steps, shift):
    """Times of the passes of a `steps`-step sampler, 1 > ... > 0, without the final 0.

    schedule(4, 5) is Wan's 1000, 750, 500, 250 after the shift: 1, .9375, .8333, .625."""
    return [shift_time(1 - i / steps, shift) for i in range(steps)]


def make_timesteps(t, like, cond_frames):
    """(b, f) times for the clip `like`: t (a number or (b, 1)) everywhere, 0 on the first
    `cond_frames` frames, which stay clean."""
    times = torch.zeros(like.shape[:2], device=like.device) + t
    times[:, :cond_frames] = 0
    return times


def score_levels(u, shift, low=0.02, high=0.98):
    """Noise levels for the real and the fake score from u ~ U[0, 1]: shifted, then clamped away
    from both ends, where the clean clip or the noise can be read off (DMD2, 2405.14867)."""
    return shift_time(u, shift).clamp(low, high)


def expand_t(t):
    """(b, f) -> (b, f, 1, 1, 1), to multiply a clip."""
    return t[..., None, None, None]


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps. Frames with t = 0 come back bit for bit."""
    return torch.lerp(x0, eps, expand_t(t).to(x0.dtype))


def x0_from_flow(x_t, v, t):
    """x0 = x_t - t v"""
    return x_t - expand_t(t) * v


def solver_step(x_t, x0, t, t_next, before=None):
    """The state at t_next < t of an ODE that is at x_t, where the network guesses its end x0.

    Euler's step is x0 + (t_next / t) (x_t - x0). DPM-Solver++(2M) (2211.01095, algorithm 2) before
    that extrapolates x0, linearly in log((1 - t) / t), from `before`, the last (guess, time). Where
    the logarithm is infinite, in the first two steps and the last, Euler's is left."""
    if before is not None and before[1] < 1 and t_next > 0:
        old, now, then = (math.log((1 - s) / s) for s in (before[1], t, t_next))
        x0 = x0 + (then - now) / (now - old) / 2 * (x0 - before[0])
    return x0 + t_next / t * (x_t - x0)


def guide(cond, uncond, scale):
    """Classifier-free guidance, uncond + scale (cond - uncond); 1 is none. Self Forcing and its
    relatives write cond + s (cond - uncond): their s is our scale - 1."""
    return uncond + scale * (cond - uncond)


def frame_mean(values, t):
    """Mean of values (b, f, ...) over all frames, in which conditioning frames (t = 0) count as
    zero. So it is linear, and the parts of a batch add up."""
    return (values.flatten(2).mean(2) * (t > 0)).mean()


# ---------------------------------------------------------------- stage 0 and the fake score
def flow_matching_loss(velocity, x0, eps, t):
    """|| velocity(x_t, t) - (eps - x0) ||^2 (flow matching, 2210.02747). Trains the teacher.

    velocity: callable (x_t, t) -> flow."""
    return frame_mean((velocity(add_noise(x0, eps, t), t) - (eps - x0)).square(), t)


def fake_score_loss(velocity, x_student, eps, t):
    """Flow matching on the student's own clips, with no gradient to the student (paper eq. 5)."""
    return flow_matching_loss(velocity, x_student.detach(), eps, t)


# ---------------------------------------------------------------- stage 1
def to_frames(values, image, cfg):
    """A chunk's value for each of its frames, `image` for the conditioning frames:
    (b, chunks) -> (b, f)."""
    return torch.cat([values.new_full((len(values), cfg.first), image),
                      values.repeat_interleave(cfg.chunk, 1)], 1)


def states_at(path, point):
    """The states of trajectories (b, points + 1, f, c, h, w) at one point per frame (b, f)."""
    index = point[:, None, :, None, None, None].expand(-1, 1, -1, *path.shape[3:])
    return path.gather(1, index)[:, 0]


def on_clean_context(velocity, clean, mask, first=0):
    """A network whose chunks see the clean chunks before them, and themselves as they are, in one
    pass over [clean | x_t] (teacher forcing): callable (x_t, t, text) -> flow. Such a pass equals
    cached inference on a clean history, with positions that are frame numbers.

    clean: (b, f, c, h, w); mask: (f, f) bool, block-causal. Two parts are left out, since no chunk
    sees them: the clean last chunk, and the image in x_t, its `first` frames (flow 0)."""
    frames, own = list(range(len(mask))), mask & mask.T  # frames of one chunk see each other
    n_past = int((~own[-1]).sum())  # frames before the last chunk
    past, made = frames[:n_past], frames[first:]
    seen = torch.cat([torch.cat([mask, torch.zeros_like(own)], 1)[:n_past],  # by clean chunks
                      torch.cat([mask & ~own, own], 1)[first:]])             # by noisy ones
    seen = seen[:, [*past, *(len(frames) + i for i in made)]]

    def on_context(x_t, t, text):
        x = torch.cat([clean[:, past], x_t[:, made]], 1)
        levels = torch.cat([0 * t[:, past], t[:, made]], 1)
        flow = velocity(x, levels, text, mask=seen, positions=[*past, *made])[:, n_past:]
        return F.pad(flow, (0,) * 6 + (first, 0))

    return on_context


def ode_regression_loss(velocity, x_t, x_end, t):
    """|| G(x_t, t) - x_end ||^2 on clean clips, every frame at its own level (paper eq. 3).

    x_t, x_end: a state of the teacher's ODE trajectory, and the trajectory's clean end."""
    return frame_mean((x0_from_flow(x_t, velocity(x_t, t), t) - x_end).square(), t)


def consistency_loss(velocity, average, path, point, times):
    """|| G(x_t, t) - stopgrad(G_ema(x_next, t_next)) ||^2 for neighbouring states of a trajectory
    (consistency models, 2303.01469, eq. 7; Causal-rCM, 2606.25473, starts a student with it).

    velocity, average: the student and its running average, callables (x_t, t) -> flow. path, point:
    see states_at(); times (points + 1,) of the states. Before the last state, at t = 0, the target
    is the trajectory's end, as in ode_regression_loss()."""
    after = (point + 1).clamp_max(len(times) - 1)
    with torch.no_grad():
        x_next = states_at(path, after)
        target = x0_from_flow(x_next, average(x_next, times[after]), times[after])
    return ode_regression_loss(velocity, states_at(path, point), target, times[point])


# ---------------------------------------------------------------- stage 2
def dmd_gradient(x, x0_real, x0_fake):
    """(x0_fake - x0_real) / mean|x - x0_real|, the mean over a clip (paper eq. 6; DMD eq. 7-8).

    x: the student's clip; x0_real, x0_fake: the clean clips that the real score (the teacher) and
    the fake score see behind the noised x. A student equal to its teacher has the gradient 0."""
    scale = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return (x0_fake - x0_real) / scale.clamp_min(1e-12)


def dmd_loss(x, grad):
    """0.5 mean|| x - stopgrad(x - grad) ||^2, whose gradient is grad / count (paper eq. 6)."""
    # in float32 x - (x - grad) would round a small grad away; mps has no float64
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    x, grad = x.to(exact), grad.to(exact)
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def frame_difference(x):
    """x[:, 1:] - x[:, :-1], the motion. DMD on it is the flow distribution matching of Diagonal
    Distillation (2603.09488)."""
    return x[:, 1:] - x[:, :-1]


def motion(x, lag=4):
    """Root mean square difference of frames `lag` apart; it falls when a student turns static."""
    lag = min(lag, x.shape[1] - 1)
    return (x[:, lag:] - x[:, :-lag]).detach().square().flatten(1).mean(1).sqrt().mean()


# ---------------------------------------------------------------- stage 3
def logistic_d_loss(real, fake):
    """softplus(-D(real)) + softplus(D(fake)), logits of any shape (paper eq. 8)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def logistic_g_loss(real, fake):
    """softplus(-D(fake)) (paper eq. 9). `real` is unused: GAN losses take the same arguments."""
    return F.softplus(-fake).mean()


def relativistic_d_loss(real, fake):
    """softplus(-(D(real) - D(fake))), in pairs of one condition (R3GAN, 2501.05441, eq. 2)."""
    return F.softplus(fake - real).mean()


def relativistic_g_loss(real, fake):
    """softplus(-(D(fake) - D(real))), the reverse of relativistic_d_loss."""
    return F.softplus(real - fake).mean()


GAN_LOSSES = {  # name -> (the discriminator's loss, the student's, whether that one reads `real`)
    "logistic": (logistic_d_loss, logistic_g_loss, False),
    "relativistic": (relativistic_d_loss, relativistic_g_loss, True),
}


def approx_r1_r2(discriminate, x_t, logits, delta):
    """|D(x) - D(x + delta)|^2, delta ~ N(0, sigma^2): R1 on real clips, R2 on generated ones
    (paper eq. 10; APT, 2501.08316, eq. 6).

    About sigma^2 |grad D|^2, so its strength is lambda sigma^2. A finite difference in place of a
    gradient penalty: it needs no second backward pass, which FSDP2 refuses. discriminate: callable
    x_t -> logits at the SAME noise level; logits: D(x_t)."""
    return (logits - discriminate(x_t + delta)).square().mean()
