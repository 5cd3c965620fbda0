"""Clips beside a stage's steps: its data set, trajectories to learn from, a probe of futures."""
from dataclasses import asdict

import torch
from tqdm import tqdm

import losses as L
from data import Draws, LatentFolder, dataset, held_out_ids
from model import stream_mask
from sample import generate, sample_ode, with_cfg
from scale.parallel import barrier, on_rank0, world
from utils.errors import require
from utils.files import clips_in, save_finite


def open_dataset(cfg, trajectory_folders):
    """dataset(cfg), with latents checked against the network. Captions alone serve stage 1, and
    stage 2 without an image or with stage 1's trajectories, whose ends are clips; or UsageError."""
    data = dataset(cfg)
    if not data.latent:
        return data
    made = [folder for folder in trajectory_folders if clips_in(folder)]
    if data.only_text and cfg.stage == 2 and made:
        captions, data = data, LatentFolder(made[0], cfg.frames)
        data.negative = captions.negative
    enough = cfg.stage == 1 or cfg.stage == 2 and not cfg.first  # no image is needed
    require(not data.only_text or enough, f"{data.paths[0]} holds a caption alone, for "
            f"stage 1 and then stage 2: stage {cfg.stage} needs clips, see python -m scale.encode")
    data.network = cfg
    data.read(data.paths[0])
    return data


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
        teacher = run.nets["teacher"]
        if cfg.ode_context == "real":  # all chunks at once, each on its own and a real past
            teacher = L.on_clean_context(teacher, batch.x0, stream_mask(cfg))
        velocity = with_cfg(teacher, batch.text, cfg.guidance, run.negative)
        noise, times = batch.draws.randn(*batch.x0.shape[1:]), L.schedule(cfg.ode_steps, cfg.shift)
        with run.autocast():
            end, states = sample_ode(velocity, noise, batch.x0[:, :image], times, keep)
        if world()[0] % cfg.context_parallel == 0:  # the others of a group have made the same
            paths = torch.stack([*states, end], 1)
            for n, path, text, x0 in zip(numbers, paths, batch.text, batch.x0):
                past = {"context": x0} if cfg.ode_context == "real" else {}
                save_finite(files[n], {"states": path, "text": text, **past})
    barrier()
    run.trajectories = files


def sample_clips(run, name, batch, draws, steps=None):
    """Clips (b, f, c, h, w) that one of a stage's networks makes of the images of a batch."""
    cfg = run.cfg
    with run.autocast():
        return generate(run.nets[name], asdict(cfg), batch.x0[:, :cfg.first], batch.text,
                        lambda n: draws.randn(n, *batch.x0.shape[2:]), cfg.frames, steps)


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
        ends.append(L.quarters(torch.stack(clips)).var(0))
    return torch.cat(ends).mean().sqrt().item()
