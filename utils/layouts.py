"""Published layouts of Wan's weights: which files, whose names, what they are, and are not.

The network has the official names. Diffusers' names are renamed, one to one; prefixes that wrappers
leave (module., student., pipe.dit., _fsdp_wrapped_module. ...) are taken off; what this network
cannot load is called by its name.
"""
import re
from pathlib import Path

from model import PRESETS
from utils.errors import first_process, require
from utils.files import read_json

ENDINGS = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".gguf")
COMPANION = re.compile(r"(?<![a-z])(vae|u?m?t5|clip)(?![a-z])", re.I)  # Wan2.1_VAE.pth and so on
SHARD = re.compile(r"-(\d+)-of-(\d+)(?=\.)")
INNER = re.compile(r"(?<![a-z_])(?:_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module)\.")
OUTER = ("module.", "model.", "base_model.", "pipe.", "vae.", "first_stage_model.", "text_encoder.")
NETWORK = re.compile(r"(|.*\.)(?:time_projection\.1|condition_embedder\.time_proj)\.weight")
BESIDE = re.compile(r"(.*\.)?(vae|first_stage_model|cond_stage_model|(text|image)_encoders?)\.")
NESTED = ("generator_ema", "generator", "model_ema", "ema", "state_dict", "model", "module",
          "student", "transformer")  # where the weights of a .pt may be, the first one first


# ---------------------------------------------------------------- files

def listed(paths):
    """File names in words, at most eight."""
    names = [path.name for path in paths]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def downloaded(path):
    """What a path on the command line means: of Hugging Face's cache, a model's folder in it
    (models--A--B) or one above, the one snapshot; any other path as it is. UsageError, with the
    candidates, if there are several; for a repository's name; for links whose files are gone."""
    given, path = path, Path(path).expanduser()  # the shell leaves --wan=~/x as it is
    require(path.exists() or path.parent.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", given),
            f"{given} does not exist: check the path, or if it names a repository, download it: hf "
            f"download {given} --local-dir DIR")
    hub = path / "hub" if (path / "hub").is_dir() else path
    models = sorted(hub.glob("models--*"), key=lambda p: ("wan" not in p.name.lower(), p.name))
    require(len(models) < 2, f"{path} is Hugging Face's cache, with {len(models)} models "
            f"({listed(models)}): name the folder of one")
    model = (*models, path.parent if path.name == "snapshots" else path)[0]
    if models or (model / "snapshots").is_dir():
        found = sorted(p for p in model.glob("snapshots/*") if p.is_dir() and any(p.iterdir()))
        require(len(found) == 1, f"{model} is a model in Hugging Face's cache with {len(found)} "
                + (f"snapshots: name one, {' or '.join(map(str, found))}" if found else
                   "finished snapshots: download it again"))
        path = found[0]
        if first_process():
            print(f"{given}: using the snapshot {path}", flush=True)
    lost = [p for p in (*path.glob("*"), *path.glob("*/*")) if p.is_symlink() and not p.exists()
            and p.suffix.lower() in (*ENDINGS, ".json")]
    require(not lost, f"{path} has links to files that are gone ({listed(lost)}): download it "
            "again, or copy it with cp -rL from where it is whole")
    return str(path)


def refuse_shards(folder, weights):
    """Raise UsageError, with the command that joins them, for a trainer's state in shards, unless
    other weights lie beside it."""
    if all(file.name.endswith("_states.pt") for file in weights):
        require(not any(folder.glob("*.distcp")), f"{folder} holds a distributed checkpoint, in "
                "shards: join them, python -m torch.distributed.checkpoint.format_utils "
                f"dcp_to_torch {folder} FILE.pt")
        deepspeed = [*folder.glob("zero_to_fp32.py"), *folder.glob("*_optim_states.pt")]
        require(not deepspeed, f"{folder} holds DeepSpeed's state, in shards: join them with the "
                "script zero_to_fp32.py in it or above, and name the file that it writes")


def weight_files(folder, companions=False):
    """The weight files of a folder, hidden files left out; without `companions` also VAE, text and
    image encoder of the official folder are."""
    found = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in ENDINGS and p.is_file()
                   and not p.name.startswith("."))
    refuse_shards(Path(folder), found)
    return [p for p in found if companions or not COMPANION.search(p.name)]


def network_folder(path):
    """The folder of the network inside a downloaded repository: `transformer` in diffusers' layout,
    the folder itself in the official one. UsageError for the two experts of Wan 2.2."""
    experts = [name for name in ("transformer", "transformer_2", "high_noise_model",
                                 "low_noise_model") if (path / name).is_dir()]
    require(not {"transformer_2", "high_noise_model", "low_noise_model"} & set(experts),
            f"{path} holds {' and '.join(experts)}, Wan 2.2's two experts for high and low noise: "
            "this network is Wan 2.1's, a single one; download Wan2.1-T2V-1.3B or 14B")
    return path / "transformer" if experts else path


def files_of(path, companions=False):
    """The weight files that `path` names: itself, those of its index, or the one set in the folder.

    UsageError if files are missing, or if the folder holds more than one set."""
    if path.is_file():
        return [path]
    index = sorted(p for p in path.glob("*.safetensors.index.json") if p.name[0] != ".")
    require(len(index) < 2, f"{path} holds {len(index)} sets of weights ({listed(index)}): move "
            "all but one away")
    if index:
        shards = sorted({path / name for name in read_json(index[0])["weight_map"].values()})
        lost = [file for file in shards if not file.is_file()]
        require(not lost, f"{path} lacks {listed(lost)} of the {len(shards)} files that "
                f"{index[0].name} names: download the rest")
        beside = [file for file in weight_files(path, companions) if file not in shards]
        require(not beside, f"{path} holds {listed(beside)} beside the {len(shards)} files that "
                f"{index[0].name} names: name the file itself, or move it away")
        return shards
    files = weight_files(path, companions)
    sets = {SHARD.sub("", file.name) for file in files}
    require(len(sets) < 2, f"{path} holds more than one set of weights ({listed(files)}): name "
            "the file itself, or move all but one away")
    parts = [SHARD.search(file.name) for file in files]
    if len(files) > 1 or any(parts):
        number = int(parts[0][2])
        require(len(files) == number, f"{path} holds {len(files)} of {number} files "
                f"({listed(files)}): download the rest")
    return files


def one_deeper(folder):
    """The folders in a folder that hold a network or a download. glob() passes over those that may
    not be read."""
    return sorted(p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."
                  and not re.search("vae|encoder|clip", p.name)
                  and (any(p.glob("model_index.json")) or weight_files(p)))


def config_beside(path):
    """The config.json of a folder, or of the folder that a file is in; {} if there is none."""
    config = (path if path.is_dir() else path.parent) / "config.json"
    settings = read_json(config) if config.is_file() else {}
    return settings if isinstance(settings, dict) else {}


# ---------------------------------------------------------------- names

def without_wrappers(weights, path):
    """(prefix, the same weights without the prefixes that wrappers leave in front of and inside
    names). Of a flat file with several networks, the generator (its running average first);
    UsageError if none of them is called so."""
    weights = {INNER.sub("", name): w for name, w in weights.items()}
    starts = sorted(found[1] for name in weights if (found := NETWORK.fullmatch(name)))
    named = [start for word in ("generator_ema", "generator") for start in starts
             if word in start.split(".")]
    require(named or len(starts) < 2, f"{path} holds {len(starts)} networks, under "
            f"{' and '.join(start or 'no prefix' for start in starts)}: save one of them alone")
    if not starts:  # a VAE, a text encoder, a LoRA
        while prefix := next((p for p in OUTER if all(n.startswith(p) for n in weights)), None):
            weights = {name.removeprefix(prefix): w for name, w in weights.items()}
        return "", weights
    start = (named or starts)[0]
    left = sorted({name.split(".")[0] for name in weights if not name.startswith(start)
                   and not BESIDE.match(name)})
    require(named or not left, f"{path} holds {', '.join(left[:4])} beside the network, whose "
            f"names begin with {start}: save the network alone")
    return start, {k.removeprefix(start): w for k, w in weights.items() if k.startswith(start)}


DIFFUSERS = (  # diffusers' part of a name -> the official one
    ("condition_embedder.time_embedder.linear_1.", "time_embedding.0."),
    ("condition_embedder.time_embedder.linear_2.", "time_embedding.2."),
    ("condition_embedder.text_embedder.linear_1.", "text_embedding.0."),
    ("condition_embedder.text_embedder.linear_2.", "text_embedding.2."),
    ("condition_embedder.time_proj.", "time_projection.1."),
    ("proj_out.", "head.head."),
    (".attn1.", ".self_attn."), (".attn2.", ".cross_attn."),
    (".to_q.", ".q."), (".to_k.", ".k."), (".to_v.", ".v."), (".to_out.0.", ".o."),
    (".ffn.net.0.proj.", ".ffn.0."), (".ffn.net.2.", ".ffn.2."),
    (".norm2.", ".norm3."))  # the affine norm, before cross-attention


def official_name(name):
    """The official name of one of diffusers' WanTransformer3DModel."""
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace(".scale_shift_table", ".modulation")
    for theirs, ours in DIFFUSERS:
        name = name.replace(theirs, ours)
    return name


T5 = (  # the official text encoder's part of a name -> that of transformers' UMT5EncoderModel
    ("token_embedding.", "shared."), ("blocks.", "encoder.block."),
    (".attn.", ".layer.0.SelfAttention."), (".norm1.", ".layer.0.layer_norm."),
    (".pos_embedding.embedding.", ".layer.0.SelfAttention.relative_attention_bias."),
    (".norm2.", ".layer.1.layer_norm."), (".ffn.gate.0.", ".layer.1.DenseReluDense.wi_0."),
    (".ffn.fc1.", ".layer.1.DenseReluDense.wi_1."), (".ffn.fc2.", ".layer.1.DenseReluDense.wo."))


def transformers_name(name):
    """transformers' name of one of the official models_t5_umt5-xxl-enc-bf16.pth."""
    if name == "norm.weight":
        return "encoder.final_layer_norm.weight"
    for theirs, ours in T5:
        name = name.replace(theirs, ours)
    return name


# ---------------------------------------------------------------- kinds

FOREIGN = (  # (pattern of a name, what such weights are, what to do)
    (r"lora_|\.lora|\.diff(_b)?$", "a LoRA, a small change to other weights",
     "merge it into the weights it was made for, and name the result"),
    (r"scaled_fp8|scale_weight|weight_scale|scale_input|input_scale",
     "weights in scaled fp8, each with a factor of its own", "take the bfloat16 or float32 file"),
    (r"qweight|absmax|quant_map|\.SCB$|weight_format", "quantised weights",
     "take the bfloat16 or float32 file"),
    (r"vace_", "VACE, which is edited by reference videos", "take Wan2.1-T2V"),
    (r"img_emb|image_embedder|k_img|add_k_proj", "the image-to-video (I2V) network, which reads "
     "CLIP's image features", "take Wan2.1-T2V: here the image is the first chunk"),
    (r"control_adapter|face_adapter|motion_encoder|audio|camera|ref_conv", "a variant of Wan with "
     "further inputs", "take Wan2.1-T2V"),
    (r"^decoder\.(conv1|conv_in|upsamples)", "a video VAE", "name it with --vae"),
    (r"^(shared|token_embedding|encoder\.block\.0)\.", "a text encoder",
     "name it with --text-encoder"))


def refuse_foreign(names, shape_of, path, config):
    """Raise UsageError, with what they are, for weights that are not Wan 2.1's text-to-video."""
    for pattern, what, remedy in FOREIGN:
        require(not any(re.search(pattern, name) for name in names),
                f"{path} holds {what}: {remedy}")
    require("patch_embedding.weight" in names, f"{path} holds no Wan network: its names are "
            f"{', '.join(sorted(names)[:4])} ...; name the weights of Wan2.1-T2V")
    channels = shape_of("patch_embedding.weight")[1]
    kind = str(config.get("model_type", "")).lower()
    if kind in ("", "t2v"):
        kind = {36: "i2v", 48: "ti2v"}.get(channels, "t2v")
    require(kind == "t2v", f"{path} holds Wan's {kind.upper()} network, which takes {channels} "
            "channels: take Wan2.1-T2V, this network's kind")
    folder = path if path.is_dir() else path.parent
    expert = re.fullmatch(r"(high|low)_noise_model", folder.name)
    if not expert and path.is_file():
        expert = re.search(r"(high|low)_noise|A14B.*(high|low)", path.name, re.I)
    require(not expert, f"{path} is one of Wan 2.2's two experts, for high or for low noise alone: "
            "take Wan2.1-T2V")


def shape_from(weights, shape_of, config):
    """{field of model.Shape: value} of official weights, as far as tensors and config.json tell.
    The heads of all of Wan's networks are 128 wide."""
    dim, channels, _, patch, _ = shape_of("patch_embedding.weight")
    layers = {int(name.split(".")[1]) for name in weights if name.startswith("blocks.")}
    heads, length = config.get("num_heads"), config.get("text_len", 512)
    heads = heads or config.get("num_attention_heads") or dim // 128
    fits = type(heads) is int and heads >= 0 and (not heads or dim % (2 * heads) == 0)
    require(fits and type(length) is int and length > 0, f"the config.json beside the weights says "
            f"{heads!r} heads and {length!r} tokens of text, which do not fit a width of {dim}: it "
            "belongs to others, take it away")
    shape = dict(dim=dim, in_dim=channels, patch=patch, num_layers=max(layers, default=-1) + 1,
                 num_heads=heads, text_len=length)
    for field, name, axis in (("ffn_dim", "blocks.0.ffn.0.weight", 0),
                              ("freq_dim", "time_embedding.0.weight", 1),
                              ("text_dim", "text_embedding.0.weight", 1)):
        if name in weights:
            shape[field] = shape_of(name)[axis]
    if "head.head.weight" in weights:
        shape["out_dim"] = shape_of("head.head.weight")[0] // patch ** 2
    return shape


def preset_of(shape):
    """The name of the Wan preset that has this shape, or None."""
    fits = (name for name, preset in PRESETS.items() if name != "toy" and
            all(preset[field] == shape.get(field) for field in ("dim", "ffn_dim", "num_layers")))
    return next(fits, None)
