"""Wan's weights in the layouts that people have: each loads exactly, or one sentence says what was
given."""
import argparse
import contextlib
import json
import operator
import os
import re
import shutil
import weakref
from dataclasses import asdict
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import model as M
import sample
import train
from experiments import evaluate
from scale import encode, parallel, serve, wan
from scale.clips import StepClips
from scale.run import Batch, network_config
from tests.common import (WAN, inputs, largest_difference, network, rehearsal, relative,
                          several_processes, small_config, small_vae_and_text_encoder, tiny,
                          weights, write_official)
from utils import layouts, media, runs
from utils.errors import UsageError, friendly_errors
from utils.settings import check_compiler, default_compile, inferred_preset
from utils.weights import load_into, open_tensors, open_weights, state_dict_in

PLAIN = tiny(precondition=False)
CONFIG = {"_class_name": "WanModel", "model_type": "t2v", "num_heads": 2, "text_len": 4}


def tensors_of(cfg=PLAIN):
    """A network's tensors under official names."""
    return {name: p.detach().clone() for name, p in network(cfg).state_dict().items()}


def as_diffusers(tensors):
    """Official names written as diffusers does; the reverse of what is tested, on its own."""
    words = {"self_attn": "attn1", "cross_attn": "attn2", "q": "to_q", "k": "to_k", "v": "to_v",
             "o": "to_out.0", "modulation": "scale_shift_table", "norm3": "norm2"}
    whole = {"head.modulation": "scale_shift_table", "head.head": "proj_out"}
    embedder = "condition_embedder"
    for part in ("time", "text"):
        for n in (1, 2):
            whole[f"{part}_embedding.{2 * n - 2}"] = f"{embedder}.{part}_embedder.linear_{n}"
    whole["time_projection.1"] = f"{embedder}.time_proj"
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, last = name.rpartition(".")
        if name in whole:
            new = whole[name]
        elif stem in whole:
            new = f"{whole[stem]}.{last}"
        else:
            new = ".".join(words.get(word, word) for word in name.split("."))
            new = new.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
        renamed[new] = tensor
    return renamed


def diffusers_root(folder, tensors, **index):
    """A -Diffusers download, its transformer alone."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index}))
    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 2}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    save_file(as_diffusers(tensors),
              folder / "transformer/diffusion_pytorch_model.safetensors")
    return folder


def prefixed(tensors, start, inner=""):
    """Names as wrappers leave them: `start` in front, `inner` inside blocks."""
    return {start + name.replace("self_attn.", f"{inner}self_attn."): t
            for name, t in tensors.items()}


def zeros(*shape):
    """A tensor that must not be read."""
    return torch.zeros(shape or (2,))


LAYOUTS = {  # contents of w.pt, or of w.safetensors for flat ones that end in "!"
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "name": "x"},
    "model": lambda t: {"model": t, "step": torch.tensor(3)},
    "two deep": lambda t: {"epoch": 1, "generator": {"state_dict": t}},
    "module": lambda t: prefixed(t, "module."),
    "orig_mod": lambda t: {"generator": prefixed(t, "_orig_mod.model.")},
    "fsdp": lambda t: {"generator_ema": prefixed(t, "model._fsdp_wrapped_module.",
                                                 "_fsdp_wrapped_module."),
                       "generator": {k: 0 * v for k, v in t.items()}, "critic": {"a": t}},
    "numbers beside": lambda t: {**t, "epoch": 3, "lr": 0.1},
    "model!": lambda t: prefixed(t, "model.diffusion_model."),
    "student!": lambda t: prefixed(t, "student."),
    "student.module!": lambda t: prefixed(t, "student._orig_mod.module."),
    "pipe.dit!": lambda t: prefixed(t, "pipe.dit."),
    "pipe.dit.diffusers!": lambda t: prefixed(as_diffusers(t), "pipe.dit."),
    "peft!": lambda t: prefixed(t, "base_model.model."),
    "net.transformer!": lambda t: prefixed(t, "net.transformer."),
    "lightning": lambda t: {"state_dict": prefixed(t, "_forward_module.wan.")},
    "all in one!": lambda t: {**prefixed(t, "model.diffusion_model."), "vae.conv1.bias": zeros(),
                              "text_encoders.umt5xxl.transformer.shared.weight": zeros()},
    "module.generator": lambda t: {"state_dict": prefixed(t, "module.generator.model.") | prefixed(
        {k: 0 * v for k, v in t.items()}, "module.critic.model.")},
    "generator_ema!": lambda t: prefixed(t, "generator_ema.model.") | prefixed(
        {k: 0 * v for k, v in t.items()}, "generator.model."),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_wrapped_weights_are_those_inside(tmp_path, layout):
    tensors = tensors_of()
    contents, flat = LAYOUTS[layout](tensors), layout.endswith("!")
    file = tmp_path / ("w.safetensors" if flat else "w.pt")
    if flat:
        save_file({k: v.contiguous() for k, v in contents.items()}, file)
    else:
        torch.save(contents, file, _use_new_zipfile_serialization=layout != "module")
    opened = open_weights(file)
    net = load_into(M.build(PLAIN), opened, file)
    assert all(torch.equal(net.state_dict()[name], t) for name, t in tensors.items())
    assert "float32" in opened.note() and str(file) in opened.note()
    assert opened.role == ("student" if "generator" in str(contents.keys()) or "generator" in
                           layout or "student" in layout else "")


@pytest.mark.parametrize("starts, message", [
    (("student.", "teacher."), "holds 2 networks, under student. and teacher.: save one"),
    (("module.dit.", "module.dit2."), "under module.dit. and module.dit2.: save one"),
    (("", "critic.model."), "under no prefix and critic.model.: save one")])
def test_of_two_networks_in_one_file_none_is_guessed(tmp_path, starts, message):
    first, second = (prefixed(tensors_of(), start) for start in starts)
    save_file(first | second, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=message):
        open_weights(tmp_path / "w.safetensors")
    few = {f"{starts[1]}heads.weight": zeros()}  # no network, but nothing that may be left out
    save_file(first | few, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match="beside the network, whose names begin with"
                       if starts[0] else "has unknown critic.model.heads.weight"):
        load_into(M.build(PLAIN), open_weights(tmp_path / "w.safetensors"), "here")


def test_a_prefix_says_whose_the_weights_are(tmp_path):
    """Those of a teacher do not stream, and a student's are no teacher."""
    for start, role in (("teacher.", "teacher"), ("student.model.", "student"), ("dit.", "")):
        save_file(prefixed(tensors_of(), start), tmp_path / "w.safetensors")
        opened = open_weights(tmp_path / "w.safetensors")
        assert opened.role == role and f"({start.rstrip('.')})" in opened.note()


def test_diffusers_names_are_renamed_one_to_one(tmp_path):
    """Root or part; the same numbers; what was read is known to be a teacher."""
    tensors = tensors_of()
    root = diffusers_root(tmp_path / "wan", tensors)
    for path in (root, root / "transformer"):
        opened = open_weights(path)
        net = load_into(M.build(PLAIN), opened, path)
        assert all(torch.equal(net.state_dict()[name], t) for name, t in tensors.items())
        assert opened.role == "teacher" and opened.shape["num_heads"] == 2


@torch.no_grad()
def test_diffusers_own_network_gives_the_same_flow():
    """Its transformer with random weights, renamed, is our network."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8,
        freq_dim=16, ffn_dim=64, num_layers=2).eval()
    ours = M.build(PLAIN)
    names = {layouts.official_name(k): v for k, v in theirs.state_dict().items()}
    load_into(ours, names, "diffusers")
    x, _, text = inputs(PLAIN)
    flow = ours(x, torch.full(x.shape[:2], 0.7), text)
    same = theirs(x.transpose(1, 2), torch.full((2,), 700.0), text, return_dict=False)[0]
    assert relative(flow, same.transpose(1, 2)) < 1e-5


def touch(folder, *names):
    """Empty files in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()
    return folder


@pytest.mark.parametrize("names, message", [
    (("a.pt", "b.pt"), r"more than one set of weights \(a.pt, b.pt\)"),
    (("a.pt", "b.safetensors"), r"more than one set .*a.pt, b.safetensors"),
    (("x-00001-of-00003.safetensors", "x-00003-of-00003.safetensors"), "2 of 3 files"),
    (("w.gguf",), "is a GGUF"), (("Wan2.1_VAE.pth", "models_t5_umt5.pth"), "holds no weights"),
    ((".w.pt",), "holds no weights")])
def test_ambiguous_folders_list_their_files(tmp_path, names, message):
    with pytest.raises(UsageError, match=message):
        open_weights(touch(tmp_path / "w", *names))


def test_a_network_beside_its_companions_is_found(tmp_path):
    """By the words of their names, not by letters inside a word."""
    folder = touch(tmp_path / "w", "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth",
                   "models_clip_open-clip-xlm.pth", "checkpoint5.pt")
    assert [p.name for p in layouts.files_of(folder)] == ["checkpoint5.pt"]


def test_incomplete_downloads_and_two_experts_are_refused(tmp_path):
    folder = write_official(tmp_path / "wan", "sharded", network(PLAIN))
    (folder / "part-2-of-3.safetensors").unlink()
    with pytest.raises(UsageError, match="lacks part-2-of-3.safetensors of the 3 files"):
        open_weights(folder)
    for parts in (("transformer", "transformer_2"), ("high_noise_model", "low_noise_model")):
        root = tmp_path / parts[0]
        for part in parts:
            (root / part).mkdir(parents=True)
        with pytest.raises(UsageError, match="Wan 2.2's two experts"):
            open_weights(root)
    save_file(tensors_of(), touch(tmp_path / "low_noise_model") / "w.safetensors")
    expert = "Wan 2.2's two experts, for high or for low noise alone"
    with pytest.raises(UsageError, match=expert):
        open_weights(tmp_path / "low_noise_model")
    mine = touch(tmp_path / "my_low_noise_tests")
    save_file(tensors_of(), mine / "Wan2_2-T2V-A14B_HIGH_fp16.safetensors")
    with pytest.raises(UsageError, match=expert):
        open_weights(mine / "Wan2_2-T2V-A14B_HIGH_fp16.safetensors")
    (mine / "Wan2_2-T2V-A14B_HIGH_fp16.safetensors").rename(mine / "w.SAFETENSORS")
    assert len(open_weights(mine)) == len(tensors_of())  # a folder of any name, and any case


def test_an_index_and_other_weights_are_two_sets(tmp_path):
    folder = write_official(tmp_path / "wan", "sharded", network(PLAIN))
    touch(folder, "._part.safetensors.index.json", "Wan2.1_VAE.pth")
    assert len(open_weights(folder)) == len(tensors_of())
    touch(folder, "generator.pt")
    with pytest.raises(UsageError, match="holds generator.pt beside the 3 files that"):
        open_weights(folder)


def test_hidden_companions_are_not_read(tmp_path):
    touch(tmp_path, "Wan2.1_VAE.pth", "._Wan2.1_VAE.pth")
    assert wan.find_vae(tmp_path) == (tmp_path / "Wan2.1_VAE.pth", None)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    for name in ("w.pt", "w.safetensors", "w"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
        with pytest.raises(UsageError, match=f"{name} is a pointer of Git LFS, .* git lfs pull"):
            open_weights(tmp_path / name)


def test_a_repository_without_its_network_is_named(tmp_path):
    root = diffusers_root(tmp_path / "wan", tensors_of())
    shutil.rmtree(root / "transformer")
    with pytest.raises(UsageError, match="lacks the network, its folder transformer"):
        runs.read_settings(root)


def hub_of(folder, models):
    """Hugging Face's cache: {model: [hashes]}, its snapshots links into blobs."""
    for model, hashes in models.items():
        root = folder / "hub" / f"models--{model.replace('/', '--')}"
        touch(root / "blobs", "b0")
        touch(root / "refs", "main")
        save_file(tensors_of(), root / "blobs/b1")
        for name in hashes:
            snapshot = root / "snapshots" / name
            touch(snapshot / "transformer")
            (snapshot / "model_index.json").symlink_to("../../blobs/b0")
            (snapshot / "transformer/w.safetensors").symlink_to("../../../blobs/b1")
    return root


WAN_ID = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


def test_a_cache_of_hugging_face_stands_for_its_snapshot(tmp_path, capsys):
    """The model's folder, its snapshots, the cache, and the folder above; also a blob itself."""
    root = hub_of(tmp_path, {WAN_ID: ["abc"]})
    (root / "snapshots" / "begun").mkdir()
    touch(tmp_path / "hub", "version.txt")
    snapshot = root / "snapshots" / "abc"
    for path in (root, root / "snapshots", root.parent, tmp_path):
        for name in ("--wan", "--teacher"):
            assert train.parse([name, str(path)]) == {"teacher": str(snapshot)}
            assert f"using the snapshot {snapshot}" in capsys.readouterr().out
        args = args_for("--vae", path, "--text-encoder", path, "--wan", path)
        assert args.vae == args.text_encoder == args.wan == str(snapshot)
        assert encode.arguments(["--vae", str(path), "--out", "x"]).vae == str(snapshot)
    capsys.readouterr()
    assert args_for("--wan", snapshot).wan == str(snapshot) and not capsys.readouterr().out
    assert runs.read_settings(snapshot) is None
    assert len(open_weights(snapshot)) == len(open_weights(root / "blobs/b1")) == len(tensors_of())


@pytest.mark.parametrize("models, hurt, path, message", [
    ({WAN_ID: ["abc", "def"]}, "", "hub", "with 2 snapshots: name one, .*/abc or .*/def"),
    ({WAN_ID: []}, "", "hub", "with 0 finished snapshots: download it again"),
    ({"a/bert": ["abc"], WAN_ID: ["abc"]}, "", "", "with 2 models .models--Wan-AI.*, models--a--"),
    ({WAN_ID: ["abc"]}, "blobs/b1", "hub", "links to files that are gone .w.safetensors.")])
def test_what_a_cache_leaves_open_is_listed(tmp_path, capsys, models, hurt, path, message):
    root = hub_of(tmp_path, models)
    if hurt:
        (root / hurt).unlink()
    for command in (args_for, lambda *flags: train.parse([*map(str, flags)])):
        with pytest.raises(SystemExit):
            command("--wan", tmp_path / path)
        said = capsys.readouterr().err
        assert re.search(message, said) and said.count("\n") == 1 and "--help" not in said


def test_paths_as_they_are_typed(tmp_path, monkeypatch, capsys):
    """A home that the shell has left, and a repository's name in place of a folder."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert args_for("--wan", "~/wan").wan == str(tmp_path / "wan")
    assert args_for("--weights", "out").weights == "out"
    with pytest.raises(SystemExit):
        args_for("--wan", WAN_ID)
    assert f"hf download {WAN_ID} --local-dir" in capsys.readouterr().err


def test_files_are_known_by_their_content(tmp_path):
    """Under another ending they load, or one sentence says what they are."""
    save_file(tensors_of(), tmp_path / "w.bin")
    assert len(open_weights(tmp_path / "w.bin")) == len(tensors_of())
    torch.save(tensors_of(), tmp_path / "pt.safetensors")
    (tmp_path / "page.safetensors").write_text("<!DOCTYPE html>\n<html lang='en'>" * 99)
    (tmp_path / "page.pth").write_text("\n<HTML>")
    (tmp_path / "gguf.safetensors").write_bytes(b"GGUF" + bytes(99))
    save_file(tensors_of(), touch(tmp_path, "empty.pt", "part.safetensors.aria2")
              / "part.safetensors")
    for name, message in (("pt.safetensors", "is a .pt file under another name: rename it"),
                          ("page.safetensors", "is a web page, .* /resolve/ in place of /blob/"),
                          ("page.pth", "is a web page"), ("gguf.safetensors", "is a GGUF"),
                          ("empty.pt", "is not downloaded to its end"),
                          ("part.safetensors", "is not downloaded to its end")):
        with pytest.raises(UsageError, match=f"{name} {message}"):
            open_weights(tmp_path / name)


def test_weights_one_folder_deeper_are_found(tmp_path):
    for names in (("vae", "Wan2.1-T2V-1.3B"), ("stage1", "stage2", "text_encoder")):
        for name in names:
            save_file(tensors_of(), touch(tmp_path / names[0] / "x" / name) / "ema.safetensors")
        found = ", ".join(name for name in names if name not in ("vae", "text_encoder"))
        with pytest.raises(UsageError, match=f"name a folder in it that does, {found}$"):
            runs.read_settings(tmp_path / names[0] / "x")
    with pytest.raises(UsageError, match="no finished stage and no weights: train it first"):
        runs.read_settings(touch(tmp_path / "none"))


@pytest.mark.parametrize("names, message", [
    (("__0_0.distcp", ".metadata"), "format_utils dcp_to_torch .* FILE.pt"),
    (("mp_rank_00_model_states.pt", "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"),
     "join them with the script zero_to_fp32.py"),
    (("zero_to_fp32.py", "latest"), "join them with the script zero_to_fp32.py")])
def test_shards_of_trainers_are_joined_first(tmp_path, names, message):
    touch(tmp_path, *names)
    for read in (open_weights, runs.read_settings):
        with pytest.raises(UsageError, match=message):
            read(tmp_path)
    if "mp_rank_00_model_states.pt" not in names:  # what was joined lies beside them
        save_file(tensors_of(), tmp_path / "joined.safetensors")
        assert len(open_weights(tmp_path)) == len(tensors_of())


def test_a_vae_or_text_encoder_as_one_safetensors_file(tmp_path):
    """ComfyUI's folders, and two of them."""
    touch(tmp_path / "vae", "wan_2.1_vae.safetensors", "put_vae_here")
    assert wan.find_vae(tmp_path / "vae") == (tmp_path / "vae/wan_2.1_vae.safetensors", None)
    texts = touch(tmp_path / "text_encoders", "umt5_xxl_fp16.safetensors")
    touch(texts / "google/umt5-xxl", "spiece.model")
    assert wan.find_text_encoder(texts) == (texts / "umt5_xxl_fp16.safetensors", None,
                                            texts / "google/umt5-xxl")
    touch(tmp_path / "vae", "wan2.2_vae.safetensors")
    with pytest.raises(UsageError, match="holds 2 VAEs .wan2.2_vae.safetensors, wan_2.1_vae"):
        wan.find_vae(tmp_path / "vae")


def test_embedded_prompts_are_checked(tmp_path):
    """Latents in place of a text, and a text that is not finite."""
    save_file({"latents": torch.zeros(2)}, tmp_path / "a.safetensors")
    save_file({"text": torch.full((2, 2), torch.nan)}, tmp_path / "b.safetensors")
    for name, message in (("a", r"holds no embedded text \(latents\)"), ("b", "not finite")):
        with pytest.raises(UsageError, match=message):
            serve.stored_text(tmp_path / f"{name}.safetensors")


def one(name, *shape):
    """A tensor to add to a checkpoint."""
    return {name: zeros(*shape)}


@pytest.mark.parametrize("change, message", [
    (one("lora_unet_blocks_0.lora_down.weight"), "a LoRA"),
    (one("blocks.0.self_attn.q.lora_A.weight"), "a LoRA"),
    (one("vace_blocks.0.before_proj.weight"), "VACE"),
    (one("img_emb.proj.0.weight"), "image-to-video"),
    (one("blocks.0.self_attn.q.scale_weight", 1), "scaled fp8"),
    (one("scaled_fp8", 2), "scaled fp8"),
    (one("blocks.0.ffn.0.weight.absmax"), "quantised"),
    ({"head.head.bias": torch.zeros(16, dtype=torch.int8)}, r"quantised weights \(i8\)"),
    (one("patch_embedding.weight", 32, 36, 1, 2, 2), "I2V network, which takes 36"),
    (one("patch_embedding.weight", 32, 48, 1, 2, 2), "TI2V network, which takes 48"),
    ({"patch_embedding.weight": None, "shared.weight": torch.zeros(2)}, "a text encoder"),
    ({"patch_embedding.weight": None, "decoder.conv1.weight": torch.zeros(2)}, "a video VAE"),
    ({"patch_embedding.weight": None}, "holds no Wan network: its names are blocks.0")])
def test_other_kinds_are_named(tmp_path, change, message):
    contents = {k: v for k, v in {**tensors_of(), **change}.items() if v is not None}
    save_file(contents, tmp_path / "w.safetensors")
    with pytest.raises(UsageError, match=message):
        open_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("contents, message", [
    ({"generator": {}, "args": argparse.Namespace(lr=1)}, "holds Python objects"),
    ({"epoch": 3}, "holds no tensors"),
    ({"generator_lora": one("q.lora_A.weight"), "critic_lora": one("q.lora_A.weight")}, "a LoRA"),
    ({"student": {"a": torch.zeros(1)}, "teacher": {"a": torch.zeros(1)}}, "holds 2 networks"),
    ({"left": {"a": torch.zeros(1)}, "right": {"a": torch.zeros(1)}}, "has 2 entries")])
def test_pt_files_without_weights_are_one_sentence(tmp_path, contents, message):
    torch.save(contents, tmp_path / "w.pt")
    with pytest.raises(UsageError, match=message):
        open_weights(tmp_path / "w.pt")


def test_half_a_file_of_zeros_is_no_network():
    """As a download leaves it that has reserved its space; a new network's last layer may be 0."""
    tensors = tensors_of()
    load_into(M.build(PLAIN), {**tensors, "head.head.weight": 0 * tensors["head.head.weight"]}, "x")
    tensors["blocks.1.ffn.0.weight"] *= 0
    with pytest.raises(UsageError, match="here: blocks.1.ffn.0.weight is all zero, .* not whole"):
        load_into(M.build(PLAIN), tensors, "here")


def test_weights_that_are_not_whole(tmp_path):
    """Zeros at the end of a file, as a download leaves them; NaN; a file left by another download;
    an entry that holds itself."""
    folder = write_official(tmp_path / "wan", "single", network(PLAIN))
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-5000] + bytes(5000))
    with pytest.raises(UsageError, match="ends in zeros, so it is not whole"):
        open_weights(folder)
    broken = tensors_of()
    broken["head.modulation"][0, 0, 0] = torch.nan
    with pytest.raises(UsageError, match="here: head.modulation is not finite"):
        load_into(M.build(PLAIN), broken, "here")
    sharded = write_official(tmp_path / "sharded", "sharded", network(PLAIN))
    first = load_file(sharded / "part-1-of-3.safetensors")
    save_file({**load_file(sharded / "part-2-of-3.safetensors"), min(first): first[min(first)]},
              sharded / "part-2-of-3.safetensors")
    with pytest.raises(UsageError, match=f"holds {min(first)}, and so does another file"):
        open_weights(sharded)
    circle = {}
    circle["model"] = circle
    with pytest.raises(UsageError, match="holds no tensors"):
        state_dict_in(circle, "w.pt")


@pytest.mark.parametrize("config", [
    {"num_heads": 3}, {"num_heads": -2}, {"num_heads": 2.0}, {"text_len": "4"}, {"text_len": 0}])
def test_a_config_of_other_weights_is_refused(tmp_path, config):
    folder = write_official(tmp_path / "wan", "single", network(PLAIN))
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    with pytest.raises(UsageError, match="do not fit a width of 32: it belongs to others"):
        open_weights(folder)


def test_missing_and_foreign_names_are_both_shown():
    net, tensors = M.build(PLAIN), tensors_of()
    tensors["mine.weight"] = tensors.pop("head.modulation")
    with pytest.raises(UsageError, match="lacks head.modulation .* and has unknown mine.weight"):
        load_into(net, tensors, "here")


# ---------------------------------------------------------------- presets

def test_the_preset_is_inferred_from_shapes(tmp_path, monkeypatch):
    shape = {name: getattr(PLAIN, name) for name in asdict(PLAIN)}
    monkeypatch.setitem(M.PRESETS, "wan-14b", shape)
    folder = write_official(tmp_path / "wan", "single", network(PLAIN))
    assert open_weights(folder).preset == "wan-14b"
    assert inferred_preset({"teacher": str(folder)}) == "wan-14b"
    assert train.parse(["--wan", str(folder)]) == {"teacher": str(folder)}
    assert inferred_preset({}) == inferred_preset({"teacher": "nowhere"}) == "toy"
    with pytest.raises(UsageError, match="the shape of wan-14b: leave out --preset wan-1.3b"):
        serve.open_stage(folder, "wan-1.3b")
    cfg = train.make_config({"preset": "wan-1.3b", "device": "cpu", "teacher": str(folder)}, 1)
    with pytest.raises(UsageError, match="has dim 32, this run 1536: use --preset wan-14b"):
        train.check_start(cfg, True)


def test_a_recipe_is_that_of_the_inferred_preset(tmp_path, monkeypatch):
    """Also in its stages that have another teacher than the one that was named."""
    monkeypatch.setitem(M.PRESETS, "wan-14b", asdict(PLAIN))
    folder, configs = write_official(tmp_path / "wan", "single", network(PLAIN)), []
    monkeypatch.setattr(train, "train", configs.append)
    monkeypatch.setattr(evaluate, "summary", lambda out: None)
    train.main(["--wan", str(folder), "--recipe", "causal-teacher", "--out", str(tmp_path / "out"),
                "--device", "cpu"])
    assert [(cfg.stage, cfg.preset, cfg.batch_size) for cfg in configs] == [
        (0, "wan-14b", 64), (1, "wan-14b", 64)]
    assert configs[0].init == str(folder)
    assert runs.start_from(configs[1])[1] == tmp_path / "out" / "stage0-causal-teacher"


def test_a_stage_of_our_own_has_the_preset_that_it_was_trained_with(tmp_path):
    """A causal teacher of Wan's shape, named with --teacher, is no toy."""
    (tmp_path / "config.json").write_text(json.dumps({"stage": 0, "preset": "wan-1.3b"}))
    assert inferred_preset({"teacher": str(tmp_path)}) == "wan-1.3b"


# ---------------------------------------------------------------- teacher and student

def args_for(*flags):
    """sample.py's command line."""
    return serve.arguments(["--device", "cpu", *map(str, flags)], "")


def test_a_teacher_is_not_streamed_and_a_student_says_how(tmp_path):
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    tensors = tensors_of()
    write_official(teacher, "single", network(PLAIN))
    (teacher / "config.json").write_text(json.dumps(CONFIG))
    student.mkdir()
    (student / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "CausalWanModel"}))
    torch.save({"generator_ema": tensors}, student / "w.pt")
    for flags in ((), ("--student", "self-forcing")):
        with pytest.raises(UsageError, match="a teacher, which does not stream: name it with"):
            serve.chosen_stage(args_for("--weights", teacher, *flags))
    with pytest.raises(UsageError, match="a teacher, which does not stream"):
        sample.load_stage(teacher)  # as evaluate.py does
    with pytest.raises(UsageError, match="nothing says how the weights in .* stream"):
        serve.chosen_stage(args_for("--weights", student))
    settings = serve.chosen_stage(args_for("--weights", student, "--student", "self-forcing"))[2]
    wanted = dict(stage=2, chunk=3, sink=0, window=18, shift=5.0, absolute_positions=True,
                  student_steps=4, dim=32)
    assert {name: settings[name] for name in wanted} == wanted
    settings = serve.chosen_stage(args_for("--weights", student / "w.pt", "--student", "causvid",
                                           "--shift", 3, "--window", 0))[2]
    assert settings["student_steps"] == (1.0, 0.757, 0.522)
    assert (settings["shift"], settings["window"]) == (3.0, 0)
    for name in ("--wan", "--teacher"):
        _, codec, settings, _ = serve.chosen_stage(args_for(name, teacher, "--guidance", 2))
        assert codec is None and settings["stage"] == 0 and settings["ode_steps"] == 50
        assert settings["guidance"] == 2 and settings["first"] == 0
    with pytest.raises(UsageError, match="a student's generator, no teacher"):
        serve.chosen_stage(args_for("--teacher", student / "w.pt"))
    for flags, message in ((("--chunk", 3), "takes no settings of streams"),
                           (("--image", "assets/example.png"), "leave out --image")):
        with pytest.raises(UsageError, match=message):
            serve.chosen_stage(args_for("--teacher", teacher, *flags))


def test_stage_two_does_not_start_from_a_teacher(tmp_path, capsys):
    folder = write_official(tmp_path / "wan", "single", network(PLAIN))
    with pytest.raises(SystemExit):
        train.main(["--stage", "2", "--teacher", str(folder), "--init", str(folder), "--out",
                    str(tmp_path / "out"), *WAN])
    assert "stage 2 starts from a student" in capsys.readouterr().err


def test_a_student_is_no_teacher(tmp_path, capsys):
    torch.save({"generator_ema": tensors_of()}, tmp_path / "w.pt")
    for stage in ("1", "2"):
        with pytest.raises(SystemExit):
            train.main(["--stage", stage, "--teacher", str(tmp_path / "w.pt"), "--init",
                        str(tmp_path / "w.pt"), "--out", str(tmp_path / "out"), *WAN])
        assert "a student's generator, no teacher" in capsys.readouterr().err


@pytest.mark.parametrize("flags, message", [
    ("--times 1 1", "noise levels that fall"), ("--times 1 0.5 --steps 2", "leave out --steps"),
    ("--times 2 1", "noise levels that fall"), ("--weights a --teacher b", "leave one out"),
    ("--shift 0", "--shift 0.0 does not work"), ("--student other", "invalid choice"),
    ("--text-device gpu", "--text-device gpu: choose cuda, mps or cpu"),
    (f"--wan {__file__}", "is a file: name the folder of the download")])
def test_flags_are_checked_before_anything_is_read(capsys, flags, message):
    with pytest.raises(SystemExit), friendly_errors():
        args_for(*flags.split())
    assert message in capsys.readouterr().err


@torch.no_grad()
def test_streams_with_times_positions_and_without_a_window():
    """Explicit times are the schedule's; inside the window, absolute positions are relative ones,
    and beyond it they are not; --window 0 sees the sink alone."""
    def stream(steps=2, frames=7, **options):
        cfg = tiny(precondition=False, **options)
        g = torch.Generator().manual_seed(3)
        return torch.cat(list(sample.rollout(
            network(cfg), inputs(cfg, b=1)[0][:, :1], inputs(cfg, b=1)[2],
            lambda n: torch.randn(1, n, 4, 4, 4, generator=g), frames, steps)), 1)

    shift = tiny().shift
    assert torch.equal(stream(), stream((1.0, shift * 0.5 / (1 + (shift - 1) * 0.5))))
    assert not torch.equal(stream(), stream((1.0, 0.3)))
    assert torch.equal(stream(window=6), stream(window=6, absolute_positions=True))
    near, far = (stream(window=3, frames=10, absolute_positions=absolute)
                 for absolute in (False, True))
    assert torch.equal(near[:, :7], far[:, :7]) and not torch.equal(near[:, 7:], far[:, 7:])
    short = stream(window=0, sink=1, frames=10)
    assert short.isfinite().all() and not torch.equal(short, stream(window=3, frames=10))


@torch.no_grad()
def test_a_teacher_clip_is_guided_away_from_the_negative_prompt():
    net = network(PLAIN)
    settings = {**asdict(PLAIN), "stage": 0, "ode_steps": 3, "guidance": 4.0}
    x, _, text = inputs(PLAIN, b=1)
    away = torch.randn(2, PLAIN.text_dim)
    clips = [next(sample.generate_chunks(net, settings, x[:, :0], text, lambda n: x, 7,
                                         negative=negative)) for negative in (None, away)]
    assert clips[0].shape == x.shape and not torch.equal(*clips)
    velocity = sample.with_cfg(net, text, 4.0, away)
    times = sample.times_of(3, PLAIN.shift)
    assert torch.equal(clips[1], sample.sample_ode(velocity, x, x[:, :0], times)[0])


class FourFrames:
    """Stands in for Wan's VAE: three channels are the picture, a latent frame after the first is
    four."""
    ratio, channels = 4, 4

    def __init__(self, *_):
        pass

    def decoder(self):
        """Of a clip in one piece."""
        return lambda x: torch.cat([x[:, :1], x[:, 1:].repeat_interleave(4, 1)], 1)[:, :, :3]


class Lengths:
    """Stands in for Wan's text encoder: a caption is its length."""

    def __init__(self, *_):
        pass

    def encode(self, caption):
        """str -> (l, d)"""
        return torch.full((2, 8), float(len(caption)))


def test_a_teachers_video_has_the_frames_and_the_negative_prompt_asked_for(tmp_path, monkeypatch):
    """24 frames, which are no whole number of latents; another --negative is another video."""
    for name, stand_in in (("WanCodec", FourFrames), ("CaptionEncoder", Lengths),
                           ("find_vae", str), ("find_text_encoder", str)):
        monkeypatch.setattr(wan, name, stand_in)
    folder, videos = write_official(tmp_path / "wan", "single", network(PLAIN)), {}
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for negative in ("blur", "grey", "static"):
        frames = videos[negative] = []
        monkeypatch.setattr(sample, "video_writer", lambda *_, into=frames:
                            contextlib.nullcontext(into.extend))
        sample.main(["--teacher", str(folder), "--vae", "v", "--text-encoder", "t", "--prompt",
                     "red disc", "--negative", negative, "--size", "32x48", "--frames", "24",
                     "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "a.mp4")])
    blur, grey, static = (torch.stack(frames) for frames in videos.values())
    assert len(blur) == 24 and torch.equal(blur, grey) and not torch.equal(blur, static)


# ---------------------------------------------------------------- training

def small_wan_files(folder, only_text=False):
    """A small student, a deeper and wider real score, and captions or clips."""
    shape = dict(in_dim=4, out_dim=4, text_dim=8, text_len=4, freq_dim=16, precondition=False)
    student = tiny(**shape)
    larger = tiny(**{**shape, "dim": 48, "ffn_dim": 80, "num_layers": 3, "num_heads": 2})
    write_official(folder / "wan", "single", network(student))
    write_official(folder / "large", "single", network(larger))
    (folder / "large/config.json").write_text(json.dumps(CONFIG))
    torch.save({"generator": tensors_of(student)}, folder / "ode.pt")
    (folder / "data" / "negative").mkdir(parents=True)
    for i in range(2):
        clip = {} if only_text else {"latents": torch.randn(9, 4, 4, 6)}
        save_file({"text": torch.randn(4, 8), **clip}, folder / f"data/{i}.safetensors")
    save_file({"text": torch.randn(2, 8)}, folder / "data/negative/text.safetensors")
    return ["--teacher", str(folder / "wan"), "--init", str(folder / "ode.pt"), "--data",
            str(folder / "data"), "--stage", "2", *WAN, "--iters", "1", "--fake-updates", "1"]


def test_the_real_score_may_be_larger_and_frozen_networks_offloaded(tmp_path):
    """Stage 2 from published ODE weights with captions alone and a larger real score. Offloading
    does not change a bit, the larger network changes the result."""
    flags = small_wan_files(tmp_path, only_text=True)
    flags += "--first 0 --sink 0 --window 9 --chunk 3 --latent-size 4 6".split()
    real = ["--real-score", str(tmp_path / "large")]
    results = []
    for name, more in (("a", real), ("b", [*real, "--offload"]), ("c", [])):
        train.main(["--out", str(tmp_path / name), *flags, *more])
        results.append(weights(tmp_path / name / "stage2"))
    assert all(t.isfinite().all() for t in results[0].values())
    assert largest_difference(results[0], results[1]) == 0
    assert largest_difference(results[0], results[2]) > 0
    cfg = train.make_config(train.parse([*flags, *real]), 2)
    assert network_config(cfg, "teacher").dim == 48 and network_config(cfg, "fake").dim == 32
    assert len(runs.origins(cfg)) == 3


def test_a_student_without_a_name_is_not_the_teacher(tmp_path, capfd):
    """A single file of Wan's own network says nothing of its role: compared with the teacher's. A
    student is trained on with these settings, whatever it was made with: they are printed."""
    flags = [*small_wan_files(tmp_path), "--out", str(tmp_path / "a")]
    torch.save(torch.load(tmp_path / "ode.pt")["generator"], tmp_path / "bare.pt")
    with pytest.raises(SystemExit):
        train.main([*flags, "--init", str(tmp_path / "bare.pt")])
    assert "bare.pt is the teacher in" in capfd.readouterr().err
    train.main(flags)
    assert "goes on as a student with --chunk" in capfd.readouterr().out
    (tmp_path / "config.json").write_text('{"num_heads": 2, "text_len": 4}')
    stream = ["--student", "causvid", "--wan"]
    with pytest.raises(UsageError, match="bare.pt is Wan's own network"):
        serve.chosen_stage(args_for("--weights", tmp_path / "bare.pt", *stream, tmp_path / "wan"))
    serve.chosen_stage(args_for("--weights", tmp_path / "bare.pt", *stream, tmp_path / "data"))


class Somewhere:
    """As much of a tensor as is needed to see where it is."""

    def __init__(self, device):
        self.device = device

    def to(self, device):
        return self if device == self.device else Somewhere(device)


@pytest.mark.parametrize("offload", [False, True])
def test_clips_of_a_step_wait_in_host_memory(offload):
    """With --offload; and what was one tensor stays one, or the memory would be held twice."""
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    clips = StepClips(SimpleNamespace(device=gpu, cfg=SimpleNamespace(offload=offload)))
    x, text, clip = Somewhere(gpu), Somewhere(gpu), Somewhere(gpu)
    clips.append(Batch([0, 1], x, text, None, real=(x, text)), clip)
    clips.append(Batch([0, 1], x, text, None, real=(Somewhere(gpu), text)), clip)
    for pairs, place in ((clips.held, cpu if offload else gpu), (list(clips), gpu)):
        for batch, clip in pairs:
            assert {t.device for t in (batch.x0, batch.text, *batch.real, clip)} == {place}
            assert batch.real[1] is batch.text
        assert [batch.real[0] is batch.x0 for batch, _ in pairs] == [True, False]


@pytest.mark.slow
def test_two_processes_share_a_larger_real_score(tmp_path):
    flags = [*small_wan_files(tmp_path), "--real-score", str(tmp_path / "large"), "--offload"]
    train.main(["--out", str(tmp_path / "one"), *flags])
    several_processes(2, tmp_path, "--out", str(tmp_path / "two"), *flags)
    results = [weights(tmp_path / name / "stage2") for name in ("one", "two")]
    assert largest_difference(*results) < 1e-5


def test_an_offloaded_block_is_on_the_device_while_it_runs():
    cfg, seen = tiny(), []
    with torch.device("meta"):
        net = M.build(cfg)
    net = parallel.allocate(net, torch.device("cpu"), offloaded=True)
    load_into(net, network(cfg).state_dict(), "here")
    block = net.blocks[1]
    home = [p.data_ptr() for p in block.parameters()]
    block.register_forward_pre_hook(lambda b, _: seen.append(len(b.at_home)))
    with torch.no_grad():
        assert torch.equal(net(*inputs(cfg)), network(cfg)(*inputs(cfg)))
    assert seen == [len(home)] and not hasattr(block, "at_home")
    assert home == [p.data_ptr() for p in block.parameters()]


def test_without_a_compiler_compile_is_one_sentence(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UsageError, match=r"needs a compiler, and there is no (g|clang)\+\+"):
        check_compiler("cpu")
    with pytest.raises(UsageError, match="does not work with --device mps"):
        check_compiler("mps")
    with pytest.raises(UsageError, match="--compile needs a compiler"):
        small_config(2, "--compile", "all")
    monkeypatch.setenv("CXX", shutil.which("false", path=os.defpath))
    with pytest.raises(UsageError, match="false --version fails: repair it, name another in CXX"):
        check_compiler("cpu")


def test_long_stages_on_a_cpu_are_compiled(monkeypatch, capsys):
    """The networks that see whole clips, where a compiler works: else a word, and no failure."""
    monkeypatch.setattr(torch, "compile", lambda f, **_: f)
    assert default_compile(small_config(0, "--iters", 199)) == "none"
    assert default_compile(small_config(2, "--iters", 200)) == "none"
    assert {default_compile(small_config(n, "--iters", 200)) for n in (0, 1, 3)} == {"clips"}
    with monkeypatch.context() as torchrun:
        torchrun.setenv("RANK", "0")
        assert default_compile(small_config(0, "--iters", 200)) == "none"
    for error in (RuntimeError("no Python.h\nand more"), RuntimeError()):
        monkeypatch.setattr(torch, "compile", Mock(side_effect=error))
        assert default_compile(small_config(0, "--iters", 200)) == "none"
    assert [line.split(": ")[1] for line in capsys.readouterr().err.splitlines()] == [
        "no Python.h", "RuntimeError"]
    compiled = {}
    for stage in range(4):
        seen = compiled.setdefault(stage, set())
        monkeypatch.setattr(torch, "compile", lambda f, **_: (seen.add(f.__self__), f)[1])
        run = rehearsal(stage, "--compile", "clips")
        compiled[stage] = {name for name, net in run.nets.items()
                           if set(parallel.blocks_of(net)) <= seen}
    assert compiled == {0: {"student"}, 1: {"student"}, 2: {"teacher", "fake"},
                        3: {"teacher", "fake", "disc"}}


def test_compiled_blocks_are_graphs(monkeypatch):
    """Counted, since an eager fallback gives the same numbers: one graph for all blocks, and one
    with a gradient, also where activations are checkpointed."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=backend))
    torch._dynamo.reset()
    cfg = tiny()
    net, (x, t, text) = network(cfg), inputs(cfg)
    with torch.no_grad():
        expected = net(x, t, text)
        net = parallel.shard(network(cfg), compiled=True)
        assert relative(net(x, t, text), expected) < 1e-6
    assert len(graphs) == 1
    net = parallel.shard(network(cfg), checkpointing=True, compiled=True)
    net(x, t, text).sum().backward()
    assert len(graphs) == 2
    with torch.autocast("cpu", torch.bfloat16):  # in which the first block's input might differ
        net(x, t, text)
    assert len(graphs) == 3
    gap = torch.eye(cfg.frames).bool()
    gap[:, 0] = True
    net(x, t, text, mask=gap)  # no index by a list, whose gradient torch 2.13 compiles wrong
    keys = [node.args[1] for node in graphs[-1].graph.nodes if node.target is operator.getitem]
    assert len(graphs) == 4 and any(isinstance(key, tuple) for key in keys)
    assert not any(isinstance(part, list) for key in keys if isinstance(key, tuple) for part in key)


@pytest.mark.slow
def test_training_runs_compiled_graphs(tmp_path, monkeypatch):
    """In stage 2 of official weights from its first step: student, scores and contexts."""
    graphs, compiled = [], torch.compile

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled(f, backend=backend))
    torch._dynamo.reset()
    flags = small_wan_files(tmp_path)
    train.main(["--out", str(tmp_path / "a"), *flags, "--compile", "all", "--iters", "2"])
    assert 4 <= len(graphs) < torch._dynamo.config.recompile_limit
    train.main(["--out", str(tmp_path / "b"), *flags, "--iters", "2"])
    assert largest_difference(*(weights(tmp_path / name / "stage2") for name in "ab")) < 1e-5


# ---------------------------------------------------------------- VAE and text encoder

def official_vae(vae):
    """Names of Wan2.1_VAE.pth for diffusers' VAE, from the official network's lists of layers."""
    inner = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3",
             "conv2": "residual.6", "conv_shortcut": "shortcut"}
    outer = {"quant_conv": "conv1", "post_quant_conv": "conv2", "conv_in": "conv1",
             "norm_out": "head.0", "conv_out": "head.2"}
    renamed = {}
    for name, tensor in vae.state_dict().items():
        side, *rest = name.split(".")
        if side not in ("encoder", "decoder"):
            new = [outer[side], *rest]
        elif rest[0] == "mid_block":
            place = {"resnets": 2 * int(rest[2]), "attentions": 1}[rest[1]]
            new = [side, "middle", str(place), inner.get(rest[3], rest[3]), *rest[4:]]
        elif rest[0] == "down_blocks":
            new = [side, "downsamples", rest[1], inner.get(rest[2], rest[2]), *rest[3:]]
        elif rest[0] == "up_blocks":  # three residual blocks and an upsampler each
            place = 4 * int(rest[1]) + (int(rest[3]) if rest[2] == "resnets" else 3)
            new = [side, "upsamples", str(place), inner.get(rest[4], rest[4]), *rest[5:]]
        else:
            new = [side, outer[rest[0]], *rest[1:]]
        renamed[".".join(new)] = tensor
    return renamed


def official_t5(encoder):
    """Names of models_t5_umt5-xxl-enc-bf16.pth for transformers' encoder."""
    parts = {"SelfAttention.relative_attention_bias": "pos_embedding.embedding",
             "DenseReluDense.wi_0": "ffn.gate.0", "DenseReluDense.wi_1": "ffn.fc1",
             "DenseReluDense.wo": "ffn.fc2"}
    renamed = {}
    for name, tensor in encoder.state_dict().items():
        words = name.split(".")
        if "embed_tokens" in words:
            continue
        if words[0] == "shared":
            new = "token_embedding.weight"
        elif words[1] == "final_layer_norm":
            new = "norm.weight"
        elif words[-2] == "layer_norm":
            new = f"blocks.{words[2]}.norm{int(words[4]) + 1}.weight"
        else:
            part = ".".join(words[5:-1])
            part = parts.get(part, part.replace("SelfAttention", "attn"))
            new = f"blocks.{words[2]}.{part}.weight"
        renamed[new] = tensor
    return renamed


@pytest.fixture(scope="module")
def companions(tmp_path_factory):
    """A small VAE of 16 channels and a small UMT5 in both layouts, with networks that fit."""
    folder = tmp_path_factory.mktemp("companions")
    diffusers, transformers = pytest.importorskip("diffusers"), pytest.importorskip("transformers")
    small_vae_and_text_encoder(folder)
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(base_dim=4)
    root, official = folder / "d", folder / "o"
    cfg = tiny(precondition=False, in_dim=16, out_dim=16)
    diffusers_root(root, tensors_of(cfg))
    vae.save_pretrained(root / "vae")
    words = ("tokenizer.json", "tokenizer_config.json")
    for part in ("text_encoder", "tokenizer"):
        (root / part).mkdir()
    for file in (folder / "umt5").iterdir():
        part = "tokenizer" if file.name in words else "text_encoder"
        shutil.copy(file, root / part / file.name)
    write_official(official, "single", network(cfg))
    (official / "config.json").write_text(json.dumps(CONFIG))
    torch.save(official_vae(vae), official / "Wan2.1_VAE.pth")
    encoder = transformers.UMT5EncoderModel.from_pretrained(folder / "umt5")
    torch.save({k: v.bfloat16() for k, v in official_t5(encoder).items()},
               official / "models_t5_umt5-xxl-enc-bf16.pth")
    shutil.copytree(root / "tokenizer", official / "google" / "umt5-xxl")
    return folder


@torch.no_grad()
def test_both_layouts_encode_as_the_libraries_do(companions, tmp_path, capsys, monkeypatch):
    """From the root and from the parts: diffusers' and transformers' own answers."""
    import diffusers
    import transformers
    vae = diffusers.AutoencoderKLWan.from_pretrained(companions / "d/vae").eval()
    video = torch.rand(1, 5, 3, 16, 16) * 2 - 1
    for path in ("d", "d/vae", "o", "o/Wan2.1_VAE.pth"):
        codec = wan.WanCodec(companions / path)
        latents = codec.encode(video)
        z = vae.encode(video.transpose(1, 2)).latent_dist.mode()
        assert relative(latents, ((z - codec.mean) / codec.std).transpose(1, 2)) < 1e-5
        back = vae.decode(z).sample.transpose(1, 2).clamp(-1, 1)
        assert relative(codec.decode(latents), back) < 1e-5
        assert codec.channels == 16
    own = transformers.UMT5EncoderModel.from_pretrained(companions / "umt5").eval()
    expected = own(input_ids=torch.tensor([[2, 3]])).last_hidden_state[0]
    for path, error in (("d", 1e-6), ("d/text_encoder", 1e-6), ("umt5", 1e-6), ("o", 2e-2),
                        ("o/models_t5_umt5-xxl-enc-bf16.pth", 2e-2)):
        text = wan.CaptionEncoder(companions / path).encode("red disc")
        assert relative(text, expected) < error, path
    small = tmp_path / "fp8"
    shutil.copytree(companions / "d", small, ignore=shutil.ignore_patterns("transformer", "vae"))
    file = next((small / "text_encoder").glob("*.safetensors"))
    save_file({k: t.to(torch.float8_e4m3fn) for k, t in load_file(file).items()}, file)
    assert relative(wan.CaptionEncoder(small).encode("red disc"), expected) < 0.2
    for known in (1, 3, 5):
        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__len__", lambda _: known)
        with pytest.raises(UsageError, match=f"knows {known} tokens and .* 4: it is another text"):
            wan.CaptionEncoder(companions / "d")
    monkeypatch.undo()
    short = wan.CaptionEncoder(companions / "d", length=2)
    assert short.encode("red red disc").shape == short.encode("red disc red").shape == (2, 8)
    said, warned = capsys.readouterr()
    assert warned.count("only the first 2 of 3 tokens are used") == 1
    assert "VAE: reading 194 tensors" in said and "bfloat16, from" in said and "Wan2.1_VAE" in said


def changed(path, folder, name, change):
    """A copy of a folder in which one weight file has other tensors."""
    shutil.copytree(path, folder)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return folder


CHANGES = {"lacks": lambda t: t.pop(min(t)), "has unknown": lambda t: t.update(a=torch.ones(1)),
           "is all zero, so the file": lambda t: max(t.values(), key=torch.numel).zero_(),
           "has another shape of": lambda t: t.update({min(t): t[min(t)].flatten()[:1]})}


@pytest.mark.parametrize("what", CHANGES)
def test_companions_are_never_completed_at_random(companions, tmp_path, what):
    for part, load in (("vae", wan.WanCodec), ("text_encoder", wan.CaptionEncoder)):
        folder = changed(companions / "d" / part, tmp_path / "x" / part, part, CHANGES[what])
        shutil.copytree(companions / "d/tokenizer", tmp_path / "x/tokenizer", dirs_exist_ok=True)
        with pytest.raises(UsageError, match=what):
            load(folder)


def test_wrong_companions_are_named(companions, tmp_path):
    (tmp_path / "t5").mkdir()
    (tmp_path / "t5/config.json").write_text('{"model_type": "t5"}')
    root = tmp_path / "official"
    shutil.copytree(companions / "o", root)
    (root / "Wan2.1_VAE.pth").unlink()
    bare = tmp_path / "bare"
    shutil.copytree(companions / "d/text_encoder", bare / "text_encoder")
    save_file({"a": torch.zeros(1)}, tmp_path / "odd.safetensors")
    newer = tmp_path / "newer"
    shutil.copytree(companions / "d/vae", newer)
    config = json.loads((newer / "config.json").read_text())
    listed, short, cut = (tmp_path / name for name in ("listed", "short", "cut"))
    for copy in (listed, short):
        shutil.copytree(companions / "d/vae", copy)
    (listed / "config.json").write_text("[]")
    (short / "config.json").write_text(json.dumps({**config, "latents_mean": [0.1]}))
    shutil.copytree(companions / "d", cut, ignore=shutil.ignore_patterns("vae", "transformer"))
    (cut / "tokenizer/tokenizer.json").write_text("{")
    (newer / "config.json").write_text(json.dumps({**config, "is_residual": True}))
    for load, path, message in (
            (wan.WanCodec, root, "holds WanModel, which is no VAE"),
            (wan.WanCodec, companions / "d/transformer", "holds WanTransformer3DModel"),
            (wan.WanCodec, companions / "d/tokenizer", "holds no VAE: name the folder vae"),
            (wan.WanCodec, tmp_path / "odd.safetensors", "holds no VAE: its names are a"),
            (wan.WanCodec, tmp_path / "none", "does not exist"),
            (wan.WanCodec, newer, "is Wan 2.2's VAE"),
            (wan.WanCodec, listed, "config.json holds no settings"),
            (wan.WanCodec, short, "mean and std of another number"),
            (wan.CaptionEncoder, cut, "download the tokenizer again"),
            (wan.CaptionEncoder, tmp_path / "t5", "holds t5, and Wan's text encoder is UMT5"),
            (wan.CaptionEncoder, companions / "d/vae", "holds AutoencoderKLWan, and Wan's"),
            (wan.CaptionEncoder, bare, "has no tokenizer: put the folder tokenizer"),
            (wan.CaptionEncoder, companions / "d/tokenizer", "holds no text encoder")):
        with pytest.raises(UsageError, match=message):
            load(path)


def test_the_text_encoder_is_gone_before_the_network_comes(companions, tmp_path, monkeypatch):
    models, left = [], []
    made, load = wan.CaptionEncoder.__init__, sample.load_network

    def noted(self, *args):
        made(self, *args)
        models.append(weakref.ref(self.model))

    def loaded(*args):
        left.extend(model() for model in models)
        return load(*args)

    monkeypatch.setattr(wan.CaptionEncoder, "__init__", noted)
    monkeypatch.setattr(sample, "load_network", loaded)
    common = ["--wan", str(companions / "d"), "--prompt", "red", "--steps", "1", "--frames", "13",
              "--size", "32x48", "--out", str(tmp_path / "x.gif"), "--device", "cpu"]
    sample.main(common)
    assert left == [None]
    torch.save({"generator": tensors_of(tiny(precondition=False, in_dim=16, out_dim=16))},
               tmp_path / "w.pt")
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "CausalWanModel"}))
    stream = ["--weights", str(tmp_path / "w.pt"), "--chunk", "1", "--window", "2", "--sink", "0"]
    sample.main([*common, *stream, "--prompt-at", "5", "disc"])  # both captions were encoded first
    assert left == [None, None, None] and len(models) == 2


@pytest.mark.parametrize("layout", ["d", "o"])
def test_one_download_is_enough(companions, tmp_path, layout, capsys):
    """The teacher and a student's stream from one folder, and from stored embeddings; other widths
    are refused."""
    root, out = companions / layout, tmp_path / "x.gif"
    common = ["--size", "32x48", "--frames", "5", "--out", str(out), "--device", "cpu"]
    sample.main(["--wan", str(root), "--prompt", "red disc", "--steps", "2", *common])
    assert media.read_video(out, (32, 48)).shape[0] == 5
    said = capsys.readouterr().out
    assert "VAE: reading" in said and "text encoder: reading" in said
    torch.save({"generator": tensors_of(tiny(precondition=False, in_dim=16, out_dim=16))},
               tmp_path / "w.pt")
    student = ["--weights", str(tmp_path / "w.pt"), "--student", "causvid", "--preset", "wan-1.3b"]
    with pytest.raises(UsageError, match="lacks blocks.10"):
        sample.main([*student, "--wan", str(root), "--prompt", "red", *common])
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "_class_name": "CausalWanModel"}))
    save_file({"text": torch.randn(3, 8)}, tmp_path / "t.safetensors")
    sample.main([*student[:-2], "--vae", str(root), "--text", str(tmp_path / "t.safetensors"),
                 *common])
    save_file({"text": torch.randn(3, 9)}, tmp_path / "t.safetensors")
    with pytest.raises(UsageError, match="embeddings are 9 wide, the network takes 8"):
        sample.main([*student[:-2], "--vae", str(root), "--text", str(tmp_path / "t.safetensors"),
                     *common])
    with pytest.raises(UsageError, match="has 4 channels, the network takes 16"):
        sample.main([*student[:-2], "--vae", str(companions / "vae"), "--text",
                     str(tmp_path / "t.safetensors"), *common])
