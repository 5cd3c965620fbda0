"""Clips beside a stage's steps: its data set, trajectories to learn from, CausVid's clips, a probe
of futures."""
import functools
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from tqdm import tqdm

import losses as L
from data import Draws, LatentFolder, dataset, held_out_ids
from model import KVCache, chunk_bounds, stream_mask
from sample import generate, sample_ode, with_cfg
from scale.parallel import barrier, on_rank0, world
from utils.errors import require
from utils.files import clips_in, save_finite


def open_dataset(cfg, trajectory_folders):
    """dataset(cfg), with latents checked against the network. Captions alone serve stage 1, and
    stage 2 without an image or with stage 1's trajectories, which hold clips; or UsageError."""
    data = dataset(cfg)
    if not data.latent:
        return data
    made = [folder for folder in trajectory_folders if clips_in(folder)]
    if data.only_text and cfg.stage == 2 and made:
        captions, data = data, LatentFolder(made[0], cfg.frames)
        data.negative = captions.negative
    enough = cfg.stage == 1 or cfg.stage == 2 and not cfg.first  # no image is needed
    require(not data.only_text or enough, f"{data.paths[0]} holds a caption alone, for "
            f"stage 1, and for stage 2 with --first 0: stage {cfg.stage} needs clips, see python "
            "-m scale.encode")
    require(not data.only_text or cfg.stage > 1 or cfg.ode_context != "real", f"{data.paths[0]} "
            "holds a caption alone, and trajectories of --ode-context real continue clips: use "
            "--ode-context clean or noisy, or encode clips with python -m scale.encode")
    data.network = cfg
    data.read(data.paths[0])
    return data


class StepClips:
    """A step's batches and the student's clips of them, which fake score and discriminator look at
    once the student has moved. With --offload they wait in host memory: of a large model one group
    of devices may hold all clips of a step."""

    def __init__(self, run):
        self.device, self.held = run.device, []
        self.home = torch.device("cpu") if run.cfg.offload else run.device

    def append(self, batch, clip):
        """Keep one micro-batch."""
        self.held.append(self.moved(batch, clip, self.home))

    def __iter__(self):
        return (self.moved(*pair, self.device) for pair in self.held)

    @staticmethod
    def moved(batch, clip, device):
        """(batch, clip) with all tensors on a device."""
        x0, text = batch.x0.to(device), batch.text.to(device)
        real = tuple(x0 if x is batch.x0 else text if x is batch.text else x.to(device)
                     for x in batch.real)
        return replace(batch, x0=x0, text=text, real=real), clip.to(device)


def make_trajectories(run):
    """The teacher's ODE trajectories at the student's points, a file each. Existing files stay."""
    cfg, folder, at_once = run.cfg, run.dir / "trajectories", run.cfg.micro_batch or 32
    files = [folder / f"{n:06d}.safetensors" for n in range(cfg.trajectories)]
    missing = on_rank0(lambda: [n for n, file in enumerate(files) if not file.is_file()])
    own = missing[run.rank::run.world]
    # every rank makes as many passes, so one that has fewer makes a file that is made elsewhere too
    own += missing[:1] * (-(-len(missing) // run.world) - len(own))
    keep = range(0, cfg.ode_steps, cfg.ode_steps // cfg.ode_points)
    for i in tqdm(range(0, len(own), at_once), desc="trajectories", disable=not run.is_main):
        numbers = own[i:i + at_once]
        clip_ids = [cfg.seed * 10_000_000 + 5_000_000 + n for n in numbers]
        batch = run.batch(clip_ids, "trajectories")
        image = 0 if run.data.latent and run.data.only_text else cfg.first
        noise, times = batch.draws.randn(*batch.x0.shape[1:]), L.schedule(cfg.ode_steps, cfg.shift)
        with run.autocast():
            if cfg.ode_context == "real":
                end, states = continue_clips(run, batch, noise, times, keep)
            else:
                velocity = with_cfg(run.nets["teacher"], batch.text, cfg.guidance, run.negative)
                end, states = sample_ode(velocity, noise, batch.x0[:, :image], times, keep)
        if world()[0] % cfg.context_parallel == 0:  # the others of a group have made the same
            paths = torch.stack([*states, end], 1)
            for n, path, text, x0 in zip(numbers, paths, batch.text, batch.x0):
                past = {"context": x0} if cfg.ode_context == "real" else {}
                save_finite(files[n], {"states": path, "text": text, **past})
    barrier()
    run.trajectories = files


@torch.no_grad()
def continue_clips(run, batch, noise, times, keep):
    """What sample_ode() returns, but every chunk follows the teacher's ODE on its own, after the
    real chunks before it."""
    cfg, cache = run.cfg, KVCache(run.cfg.sink, run.cfg.window, relative=False)  # as in training
    teacher = functools.partial(run.nets["teacher"], cache=cache)
    velocity = with_cfg(teacher, batch.text, cfg.guidance, run.negative)
    paths = []  # of the chunks, as lists of states
    for start, end in chunk_bounds(cfg.frames, cfg.first, cfg.chunk):
        real = batch.x0[:, start:end]
        if end == cfg.first:  # the image
            paths.append([real] * (len(keep) + 1))
        else:
            clean, states = sample_ode(velocity, noise[:, start:end], real[:, :0], times, keep)
            paths.append([*states, clean])
        velocity(real, L.make_timesteps(0.0, real, 0))  # the context pass
        cache.commit()
    *states, clean = (torch.cat(chunks, 1) for chunks in zip(*paths))
    return clean, states


def denoised_clip(run, batch, grad):
    """CausVid's clip (2412.07772): no rollout, but real clips noised chunk by chunk to levels of
    the student's schedule, and denoised in one masked pass. Its context is never its own."""
    cfg, x0 = run.cfg, batch.x0
    times = torch.tensor(L.schedule(cfg.student_steps[0], cfg.shift), device=run.device)
    level = batch.draws.choice([1.0] * len(times), (cfg.frames - cfg.first) // cfg.chunk)
    t = L.to_frames(times[level], 0.0, cfg)
    x_t = L.add_noise(x0, batch.draws.randn(*x0.shape[1:]), t)
    with torch.set_grad_enabled(grad), run.autocast():
        flow = run.nets["student"](x_t, t, batch.text, mask=stream_mask(cfg))
    return L.x0_from_flow(x_t, flow, t)


def sample_clips(run, name, batch, draws, steps=None):
    """Clips (b, f, c, h, w) that one of a stage's networks makes of the images of a batch."""
    cfg = run.cfg
    with run.autocast():
        return generate(run.nets[name], asdict(cfg), batch.x0[:, :cfg.first], batch.text,
                        lambda n: draws.randn(n, *batch.x0.shape[2:]), cfg.frames, steps)


def quarters(x):
    """The mean of each quarter of a frame, (..., h, w) -> (..., 2, 2): where things are, however
    sharp or blurred they look."""
    return F.adaptive_avg_pool2d(x.flatten(0, -4), 2).view(*x.shape[:-2], 2, 2)


@torch.no_grad()
def probe_spread(run, images=16, seeds=4):
    """How far clips of one image differ by seed: the root of the variance of the last chunk's
    quarters of a frame, the mean over held-out images. It falls when futures are forgotten; the
    variance of whole latents does not, for it also grows as clips get sharper."""
    number, ends = max(1, images // run.world), []
    clip_ids = list(held_out_ids(images))[run.rank * number % images:][:number]
    for i in range(0, number, run.cfg.micro_batch or number):
        part = clip_ids[i:i + (run.cfg.micro_batch or number)]
        batch = run.batch(part, "probe")
        draws = [Draws(part, "probe", seed, device=run.device) for seed in range(seeds)]
        clips = [sample_clips(run, "student", batch, d)[:, -run.cfg.chunk:] for d in draws]
        ends.append(quarters(torch.stack(clips)).var(0))
    return torch.cat(ends).mean().sqrt().item()
