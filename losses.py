"""The mathematics: one pure function per equation, on tensors and callables. Nothing here knows a network.

    x_t = (1 - t) x0 + t eps        the path from clean (t = 0) to noise (t = 1)
    v   = eps - x0                  what a network predicts
    x0  = x_t - t v                 what that prediction means

Videos are (b, f, c, h, w), times (b, f) in [0, 1]. A frame at t = 0 is a given one (the conditioning image): it is shown
to the networks as it is, and no loss is taken on it. "Paper" is AAD-1 (2606.03972) unless another is named.
"""
import torch
import torch.nn.functional as F


# ---------------------------------------------------------------- the path, and conversions along it

def per_frame(t):
    """(b, f) -> (b, f, 1, 1, 1), to multiply a video."""
    return t[..., None, None, None]


def shift_time(t, shift):
    """t' = s t / (1 + (s - 1) t): moves times towards noise (SD3, 2403.03206, eq. 23). Floats or tensors."""
    return shift * t / (1 + (shift - 1) * t)


def add_noise(x0, eps, t):
    """x_t = (1 - t) x0 + t eps. Frames with t = 0 come back bit for bit."""
    return torch.lerp(x0, eps, per_frame(t).to(x0.dtype))


def x0_from_flow(x_t, v, t):
    """x0 = x_t - t v"""
    return x_t - per_frame(t) * v


def flow_from_x0(x_t, x0, t):
    """v = (x_t - x0) / t. Defined for t > 0; gives 0 on frames with t = 0."""
    t = per_frame(t)
    return torch.where(t > 0, (x_t - x0) / t.clamp_min(1e-12), torch.zeros_like(x_t))


def guide(cond, uncond, scale):
    """Classifier-free guidance, uncond + scale (cond - uncond): 1 = none. Also for x0 predictions."""
    return uncond + scale * (cond - uncond)


def frame_mean(values, t):
    """Mean of values (b, f, ...) in which given frames (t = 0) count as zero: linear, so that parts of a batch add up."""
    return (values.flatten(2).mean(2) * (t > 0)).mean()


# ---------------------------------------------------------------- stage 0 and the fake score

def flow_matching_loss(velocity, x0, eps, t):
    """|| velocity(x_t, t) - (eps - x0) ||^2, given frames count as zero (flow matching, 2210.02747).

    velocity: callable (x_t, t) -> flow. Trains the teacher on real clips (stage 0)."""
    return frame_mean((velocity(add_noise(x0, eps, t), t) - (eps - x0)).square(), t)


def fake_score_loss(velocity, x_student, eps, t):
    """Flow matching on the student's own clips, without a gradient to the student (paper eq. 5; DMD2, 2405.14867)."""
    return flow_matching_loss(velocity, x_student.detach(), eps, t)


# ---------------------------------------------------------------- stage I

def ode_regression_loss(velocity, x_t, x_end, t):
    """|| G(x_t, t) - x_end ||^2 in x0 space, every frame at its own level (paper eq. 3; CausVid, 2412.07772, eq. 7).

    x_t, x_end: a state of the teacher's ODE trajectory and its clean end. Frames at t = 0 are context only."""
    return frame_mean((x0_from_flow(x_t, velocity(x_t, t), t) - x_end).square(), t)


def anchor_loss(x, x_end):
    """mean || x - x_end ||^2: the clip that the student writes from a trajectory's noise, against the trajectory's clean end (DMD,
    2311.18828, eq. 9, there with a perceptual distance). A regression is charged for every future that is missing."""
    return F.mse_loss(x.float(), x_end)


# ---------------------------------------------------------------- stage II

def dmd_gradient(x, x0_real, x0_fake):
    """(x0_fake - x0_real) / mean|x - x0_real|, the mean over a clip (paper eq. 6; DMD, 2311.18828, eq. 7-8).

    x: the student's clip; x0_real, x0_fake: what the real (guided) and the fake score make of it once it is noised.
    Undefined 0/0 (student = teacher) gives 0."""
    scale = (x - x0_real).abs().mean(dim=tuple(range(1, x.ndim)), keepdim=True)
    return torch.nan_to_num((x0_fake - x0_real) / scale)


def dmd_loss(x, grad, mask=None):
    """0.5 mean|| x - stopgrad(x - grad) ||^2, whose gradient is grad / count (paper eq. 6).

    mask: optional bool (b, f), frames that count."""
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # which it does not have
    x, grad = x.to(exact), grad.to(exact)
    if mask is not None:
        x, grad = x[mask], grad[mask]
    return 0.5 * F.mse_loss(x, (x - grad).detach())


def change(x):
    """x[:, 1:] - x[:, :-1], what happens between frames. DMD on it is flow distribution matching (Diagonal Distillation, 2603.09488)."""
    return x[:, 1:] - x[:, :-1]


def student_levels(u, shift, low=0.02, high=0.98):
    """Noise levels for the score networks from u ~ U[0, 1]: shifted, then clamped away from both ends (DMD2)."""
    return shift_time(u, shift).clamp(low, high)


# ---------------------------------------------------------------- stage III

def logistic_d_loss(real, fake):
    """softplus(-D(real)) + softplus(D(fake)), logits of any shape (paper eq. 8)."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def logistic_g_loss(real, fake):
    """softplus(-D(fake)) (paper eq. 9). The real logits are not used; both GAN losses take the same arguments."""
    return F.softplus(-fake).mean()


def relativistic_d_loss(real, fake):
    """softplus(-(D(real) - D(fake))), in pairs of the same condition (R3GAN, 2501.05441, eq. 2; ASD, 2511.01419)."""
    return F.softplus(fake - real).mean()


def relativistic_g_loss(real, fake):
    """softplus(-(D(fake) - D(real))), the reverse of relativistic_d_loss."""
    return F.softplus(real - fake).mean()


GAN_LOSSES = {"logistic": (logistic_d_loss, logistic_g_loss), "relativistic": (relativistic_d_loss, relativistic_g_loss)}


def approximate_r(discriminate, x_t, logits, delta):
    """|D(x) - D(x + delta)|^2, delta ~ N(0, sigma^2): R1 on real clips, R2 on generated ones (paper eq. 10; APT,
    2501.08316, eq. 6). A finite difference in place of the gradient penalty: no double backward, which FSDP2 refuses.

    discriminate: callable x_t -> logits at the SAME noise level; logits: D(x_t)."""
    return (logits - discriminate(x_t + delta)).square().mean()
