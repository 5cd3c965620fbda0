"""What several test files share: small networks, runs, clips and checkpoints."""

import gc
import json
import multiprocessing
import os
import socket
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # pytest-xdist runs a worker per core; read when torch starts

import av
import imageio.v2 as iio
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import losses as L
import model as M
import sample
import train
from experiments import evaluate, plan

gc.freeze()  # imported modules stay: two collections a run of train.py need not look at them
HERE = Path(__file__).resolve().parents[1]
SMALL = (
    "--dim 32 --ffn-dim 64 --num-heads 2 --num-layers 2 --disc-layers 0 1 --in-dim 8 --out-dim 8 "
    "--batch-size 4 --frames 7 --trajectories 4 --student-start 1 --eval-clips 0 --samples 0 "
    "--dtype float32 --device cpu"
).split()


def relative(a, b):
    """Norm of the difference over the norm of b."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def tiny(**options):
    """A small config whose frames are latents."""
    small = dict(dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4, text_dim=8,
                 text_len=4, freq_dim=16, frames=7, window=6)
    return M.Config(**{**small, **options})


def network(cfg, seed=0):
    """A network with random weights everywhere, the output layer included."""
    torch.manual_seed(seed)
    net = M.build(cfg).init_weights()
    torch.nn.init.normal_(net.head.head.weight, std=0.05)
    return net.eval()


def inputs(cfg, b=2, f=None, side=4, seed=1):
    """(clip, times, text) for a network."""
    g = torch.Generator().manual_seed(seed)
    f = f or cfg.frames
    return (torch.randn(b, f, cfg.in_dim, side, side, generator=g), torch.rand(b, f, generator=g),
            torch.randn(b, cfg.text_len, cfg.text_dim, generator=g))


def small_config(stage, *flags):
    """The settings of a stage of the small run, with other flags."""
    return train.make_config(train.parse(["--iters", "9", *SMALL, *map(str, flags)]), stage)


def rehearsal(stage, *flags):
    """A stage of the small run at work on clips of noise, without files."""
    return plan.Rehearsal(small_config(stage, *flags))


def recorded(net):
    """A list that fills with the calls of a network: x, t, text and the options."""
    calls, forward = [], net.forward

    def record(x, t, text, **options):
        calls.append(SimpleNamespace(x=x.detach(), t=t, text=text, **options))
        return forward(x, t, text, **options)

    net.forward = record
    return calls


class Known(torch.nn.Module):
    """Stands in for a network: answers with `answer(x, t, text)`."""

    def __init__(self, cfg, answer):
        super().__init__()
        self.cfg, self.answer = cfg, answer
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x, t, text, **options):
        return self.answer(x, t, text) + 0 * self.weight


def flow_to(target):
    """An answer whose guess of the clean clip is `target`."""
    def answer(x, t, text):
        return torch.where(L.expand_t(t) > 0, (x - target) / L.expand_t(t).clamp_min(1e-6), 0 * x)

    return answer


def rolled(cfg, **options):
    """The chunks of a rollout of a tiny network, and the calls of the network. Every pass reads the
    caption."""
    net, (x, _, text), g = network(cfg), inputs(cfg), torch.Generator().manual_seed(0)
    calls = recorded(net)
    chunks = list(sample.rollout(net, x[:, :1], text,
                                 lambda n: torch.randn(2, n, 4, 4, 4, generator=g), cfg.frames,
                                 **options))
    assert all(torch.equal(call.text, text) for call in calls)
    return [chunk.detach() for chunk in chunks], calls


def weights(folder):
    """The student's weights in a stage's folder."""
    return load_file(Path(folder) / "weights.safetensors")


def logs(folder):
    """The rows of a stage's log."""
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def timeless(folder):
    """The same without the clock."""
    return [{**row, "minutes": 0} for row in logs(folder)]


def command(small_run, stage, *flags):
    """train.py's arguments for one stage that starts from the small run."""
    continues = stage == 1 and not {"clean", "noisy"} & set(flags)
    teacher = small_run / ("stage0-causal-teacher" if continues else "stage0")
    before = teacher if stage == 1 else small_run / f"stage{stage - 1}"
    start = ["--init", str(before)] if stage else []
    return ["--stage", str(stage), *start, "--teacher", str(teacher), *SMALL, *map(str, flags)]


def largest_difference(one, two):
    """Between two dicts of tensors."""
    return max((one[k] - two[k]).abs().max().item() for k in one)


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of all four stages with a tiny network, 3 steps each."""
    out = tmp_path_factory.mktemp("run")
    train.main(["--out", str(out), "--iters", "3", *SMALL])
    return out


def colour_clip(folder, name, frames=12, side=(48, 64)):
    """A small video in which every frame has its own grey level."""
    levels = np.linspace(40, 200, frames).astype(np.uint8)
    video = np.stack([np.full((*side, 3), level) for level in levels])
    if name.endswith(".gif"):
        iio.mimsave(folder / name, list(video), duration=100)
    elif "." in name:
        with iio.get_writer(folder / name, fps=10, macro_block_size=1,
                            codec="vp9" if name.endswith("webm") else "libx264") as writer:
            for frame in video:
                writer.append_data(frame)
    else:
        (folder / name).mkdir()
        for i, frame in enumerate(video):
            iio.imwrite(folder / name / f"{i:03d}.png", frame)


def write_frames(path, frames, rate=10, times=None, aspect=1, rotation=0, transfer=0, primaries=0,
                 **options):
    """A video of grey levels or grey pictures (H, W), through PyAV, as cameras write them: shown at
    `times` / rate seconds, pixels `aspect` times as wide as high, turned, with other colours."""
    frames = [np.full((48, 64), frame, np.uint8) if np.ndim(frame) == 0 else frame
              for frame in frames]
    if path.suffix == ".gif":
        return iio.mimsave(path, frames, duration=1000 / rate)
    codec = {".webm": "libvpx-vp9", ".avi": "mpeg4"}.get(path.suffix, "libx264")
    with av.open(str(path), "w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}
                 ) as file:
        stream = file.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames[0].shape
        stream.codec_context.time_base = Fraction(1, rate)
        stream.codec_context.sample_aspect_ratio = Fraction(aspect)
        if rotation:
            stream.set_display_rotation(rotation)
        if transfer:
            stream.codec_context.color_trc = transfer
            stream.codec_context.color_primaries = primaries
        for time, frame in zip(range(len(frames)) if times is None else times, frames):
            picture = av.VideoFrame.from_ndarray(frame, "gray").reformat(format="yuv420p")
            picture.pts, picture.time_base = time, Fraction(1, rate)
            file.mux(stream.encode(picture))
        file.mux(stream.encode())


@pytest.fixture
def quick_scores(monkeypatch):
    """Scores in a tenth of the time: futures of 2 images and 2 seeds instead of 64 and 16."""
    paths = evaluate.future_paths
    monkeypatch.setattr(evaluate, "IMAGES", 2)
    monkeypatch.setattr(evaluate, "future_paths", lambda *args: paths(*args, seeds=2))


def shell(*command, status=0, cwd=HERE):
    """Run a command of this environment; its standard output and error."""
    tool = Path(sys.executable).parent / command[0]
    command = [sys.executable if command[0] == "python" else str(tool) if tool.exists()
               else command[0], *command[1:]]
    env = {**os.environ, "PYTHONPATH": str(HERE)}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def one_of_several(rank, number, port, argv, output):
    """train.main in the environment that torchrun gives to process `rank`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(number),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    train.main(argv)


def several_processes(number, folder, *argv):
    """train.py on `number` processes, forked from one that has imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.common", "torch._dynamo"])  # else FSDP imports it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"process{rank}.txt" for rank in range(number)]
    running = [context.Process(target=one_of_several, args=(rank, number, port, list(argv), output))
               for rank, output in enumerate(outputs)]
    for process in running:
        process.start()
    for process in running:
        process.join()
    failed = any(process.exitcode for process in running)
    assert not failed, "\n".join(output.read_text() for output in outputs)


def write_official(folder, kind, net):
    """The weights of `net` the way that Wan 2.1 or Self Forcing are published; returns what a user
    would name."""
    tensors = {k: v.clone() for k, v in net.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')
    if kind == "sharded":
        names, parts = sorted(tensors), {}
        for i in range(3):
            parts[f"part-{i + 1}-of-3.safetensors"] = {k: tensors[k] for k in names[i::3]}
        for file, part in parts.items():
            save_file(part, folder / file)
        where = {k: file for file, part in parts.items() for k in part}
        index = folder / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": where}))
    elif kind in ("generator", "generator_ema"):
        state = {"generator": {f"model.{k}": v * (kind == "generator") for k, v in tensors.items()}}
        if kind == "generator_ema":
            state[kind] = {f"model.{k}": v for k, v in tensors.items()}
        torch.save(state, folder / "self_forcing.pt")
        return folder / "self_forcing.pt"
    else:
        save_file({k: v.bfloat16() if kind == "bfloat16" else v for k, v in tensors.items()},
                  folder / "diffusion_pytorch_model.safetensors")
    return folder


WAN = (
    "--preset wan-1.3b --dim 32 --ffn-dim 64 --num-heads 2 --num-layers 2 --disc-layers 0 1 "
    "--in-dim 4 --out-dim 4 --text-dim 8 --text-len 4 --freq-dim 16 --frames 9 --iters 2 "
    "--batch-size 2 --trajectories 2 --ode-steps 4 --device cpu --dtype float32"
).split()


def small_wan(folder):
    """A small network like Wan's with its weights in `folder`/wan, as they are published, and clips
    in `folder`/latents."""
    cfg = M.Config(**{**M.PRESETS["wan-1.3b"],
                      **dict(dim=32, ffn_dim=64, num_heads=2, num_layers=2, in_dim=4, out_dim=4,
                             text_dim=8, text_len=4, freq_dim=16)})
    net = network(cfg)
    write_official(folder / "wan", "sharded", net)
    (folder / "latents").mkdir()
    for i in range(3):
        save_file({"latents": torch.randn(11, 4, 4, 6), "text": torch.randn(4 - i, 8)},
                  folder / "latents" / f"{i}.safetensors")
    return net


def small_vae_and_text_encoder(folder):
    """Wan's VAE and text encoder with few random weights, saved as they are published."""
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
                                     latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    vae.save_pretrained(folder / "vae")
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<unk>": 1, "red": 2, "disc": 3},
                                       unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>",
                                         unk_token="<unk>").save_pretrained(folder / "umt5")
    shape = transformers.UMT5Config(vocab_size=4, d_model=8, d_kv=4, d_ff=16, num_layers=1,
                                    num_heads=2)
    transformers.UMT5EncoderModel(shape).save_pretrained(folder / "umt5")
