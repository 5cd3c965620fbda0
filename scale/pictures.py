"""What a stage draws: samples.png and samples.gif at its end, samples.png while it trains."""
import torch
from einops import rearrange
from torch.distributed.fsdp import FSDPModule

from data import Draws, held_out_ids
from scale.clips import sample_clips
from utils.media import video_writer, write_sheet


def held_out_clips(run, passes):
    """Held-out clips and what the stage makes of their images: [(b, f, 3, H, W)], the real clips
    first, then a video for each number of network passes in `passes` (None: as trained)."""
    cfg = run.cfg
    batch = run.batch(list(held_out_ids(cfg.samples)), "samples")
    videos = [run.codec.decode(batch.x0)]
    for steps in passes:
        # the same noise for all, and at every step: what differs is the network
        draws = Draws(batch.clip_ids, "samples", cfg.seed, device=run.device)
        videos.append(run.codec.decode(sample_clips(run, "ema", batch, draws, steps)))
    for module in run.nets["ema"].modules():  # FSDP leaves the outermost weights gathered, and the
        if isinstance(module, FSDPModule):    # running average is updated shard by shard
            module.reshard()
    return videos


def draw_samples(run):
    """samples.png and samples.gif: real clips, then what the stage makes of the same images."""
    if not run.cfg.samples or not run.codec:  # latents alone cannot be shown
        return
    video = torch.cat(held_out_clips(run, [None]))
    if run.is_main:
        write_sheet(run.dir / "samples.png", video)
        with video_writer(run.dir / "samples.gif", zoom=3) as write:
            write(rearrange(video, "(r k) f c h w -> f c (r h) (k w)", r=2))


def draw_preview(run):
    """Every --preview-every steps, samples.png anew: side by side, with a white frame between, real
    clips and the same images at 1, 2 and 4 passes a chunk (a teacher: passes over the clip).

    Random numbers belong to clips, so training does not notice."""
    cfg = run.cfg
    if not cfg.preview_every or run.step % cfg.preview_every:
        return
    columns = []
    for video in held_out_clips(run, (1, 2, 4) if cfg.stage else (2, 4, cfg.ode_steps)):
        columns += [torch.ones_like(video[:, :1]), video]
    if run.is_main:
        write_sheet(run.dir / "samples.png", torch.cat(columns[1:], 1))
