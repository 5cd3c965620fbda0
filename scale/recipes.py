"""Recipes as data: of the Wan presets, and of AAD-1's relatives at every preset.

A relative is a set of train.py's flags (docs/family.md says why each). FAMILY[preset][recipe] has,
for every stage that it changes, what differs from AAD-1's stage of that preset.
"""
from utils.errors import require

# AAD-1 as published: in stage 1 a chunk sees noisy states of earlier ones
_NOISY = dict(ode_context="noisy", ode_point_weights=(0.4, 0.1, 0.1, 0.1, 0.3))
# Stage 1 has the rates of Causal Forcing, stage 2 those of Self Forcing, stage 3 the paper's.
_RECIPE = {
    0: dict(iters=0),
    1: dict(iters=2000, batch_size=64, lr=2e-6, betas=(0.9, 0.999), trajectories=16_000,
            ode_steps=48, guidance=6.0, **_NOISY),
    2: dict(iters=100, batch_size=64, dmd_weight=1.0, lr=2e-6, betas=(0.0, 0.999),
            weight_decay=0.01, grad_clip=10.0, ema=0.99, fake_lr=4e-7, fake_betas=(0.0, 0.999),
            fake_updates=5, student_start=0, guidance=4.0, score_shift=5.0),
    3: dict(iters=200, batch_size=256, gan_weight=1.0, lr=4e-7, betas=(0.0, 0.999), disc_lr=2e-6,
            backbone_lr=1e-6, disc_betas=(0.0, 0.999), disc_updates=1, disc_queries=1,
            student_start=0, r1r2_sigma=0.05),
}
# One clip per pass and activation checkpointing, or nothing of this size fits a GPU.
_FITS = dict(latent_size=(60, 104), micro_batch=1, activation_checkpointing=True)


def with_layers(layers):
    """The recipe of a network whose discriminator reads these blocks: {stage: {setting: value}}."""
    return {stage: dict(recipe, **_FITS, disc_layers=layers) for stage, recipe in _RECIPE.items()}


WAN_RECIPES = {"wan-1.3b": with_layers((14, 21, 29)), "wan-14b": with_layers((19, 29, 39))}

# ---------------------------------------------------------------- the family
# On the toy they keep AAD-1's gradient through the cache, which no paper of theirs has: from a
# start on real pasts stage 2 fails without. --no-cache-grad is the published form.

_STEPS4 = dict(student_steps=(4,), ode_anchor=0.0)
_SHARED = dict(gan_weight=0.03, disc_weight=0.03, disc_backbone="shared",
               disc_updates=1, r1r2_weight=1.0, r1r2_sigma=0.1, ode_anchor=0.0)
_ASD = dict(_STEPS4, gan_weight=1.0, gan_ratio=0.5, gan_loss="relativistic", gan_real="more",
             disc_backbone="detached", disc_updates=1)
_DIAGONAL = dict(context_level=0.1, dmd_diff_weight=1.0, ode_anchor=0.0)
_TOY_FAMILY = {
    "aad-1": {},
    "published": {1: _NOISY, 2: dict(ode_anchor=0.0, cache_grad=False),
                  3: dict(dmd_weight=0.0, gan_t_max=1.0)},
    "self-forcing": {2: _STEPS4},
    "causvid": {2: dict(_STEPS4, self_rollout=False)},
    "one-forcing": {2: _SHARED},
    "asd": {2: dict(_ASD, disc_lr=4e-4)},
    "diagonal": {2: dict(_DIAGONAL, student_steps=(4, 3, 2))},  # a clip of the toy has 3 chunks
    "causal-teacher": {0: dict(teacher_forcing=1.0, init="{teacher}", iters=800, muon_lr=0.01)},
    "consistency": {1: dict(ode_target="consistency")},
    "no-context": {2: dict(context_level=-1.0), 3: dict(context_level=-1.0)},
}
# Published settings where there are any: Self Forcing's and One-Forcing's configs, Causal Forcing's
# ODE config, Diagonal Distillation's paper. CausVid's and ASD's rates are Self Forcing's.
_WAN_FAMILY = {
    **_TOY_FAMILY,
    "published": {},  # the presets are
    "asd": {2: _ASD},
    "self-forcing": {2: dict(_STEPS4, iters=120)},
    "one-forcing": {2: dict(_SHARED, gan_real="teacher", iters=200, batch_size=8, lr=1e-5,
                            fake_lr=1e-5, guidance=6.0, disc_updates=5, disc_layers=(29,))},
    "diagonal": {2: dict(_DIAGONAL, student_steps=(5, 4, 3, 2), iters=120, sink=3, window=12)},
    "causal-teacher": {
        0: dict(teacher_forcing=1.0, init="{teacher}", iters=2000, batch_size=64, lr=2e-6,
                betas=(0.9, 0.999), ode_steps=48),
        1: dict(ode_context="real", ode_point_weights=(0.7, 0.1, 0.1, 0.1, 0.0))},
}
FAMILY = {"toy": _TOY_FAMILY, "wan-1.3b": _WAN_FAMILY, "wan-14b": _WAN_FAMILY}


def changes(given):
    """What a recipe changes in a stage, its folder and what it starts from included; {} if nothing.

    given: settings by name, with stage and out. Raises UsageError for an unknown recipe.
    A relative's stages lie beside AAD-1's: <out>/stageN-RECIPE."""
    recipe, stage, out = given.get("recipe", "aad-1"), given["stage"], given["out"]
    own = relative(given)
    require(not own or stage in own, f"--recipe {recipe} has no stage {stage} of its own: its "
            f"stages are {', '.join(map(str, own))}; leave out --recipe")
    if not own:
        return {}
    found = dict(own[stage], tag=recipe)
    if stage > 0 and stage - 1 in own:
        found["init"] = "{out}/" + f"stage{stage - 1}-{recipe}"
    where = dict(out=out, teacher=given.get("teacher") or f"{out}/stage0")
    return {name: value.format(**where) if isinstance(value, str) else value
            for name, value in found.items()}


def relative(given):
    """{stage: what the recipe changes in it}"""
    family, recipe = FAMILY[given.get("preset", "toy")], given.get("recipe", "aad-1")
    require(recipe in family, f"--recipe {recipe} is unknown: choose from {', '.join(family)}")
    return family[recipe]


def check_whole_recipe(given, control):
    """UsageError for flags that belong to one stage, or to the whole recipe, where it is not."""
    stage, recipe = given.get("stage", -1), given.get("recipe", "aad-1")
    require(not control or stage == -1 and recipe == "aad-1", "--control is for the whole recipe "
            "of AAD-1: leave out --stage and --recipe")
    require(stage != -1 or not {"tag", "init"} & given.keys(), "--tag and --init belong to one "
            "stage: add --stage")


def stages_of(given):
    """[(stage, settings)] to train: one, or all of a recipe, first AAD-1's as far as they are the
    same. If a teacher was given, stage 0 is left out. Where stage 1 continues real clips, a causal
    teacher is trained from it, and takes its place in stage 1."""
    preset = given.get("preset", "toy")
    if given.get("stage", -1) != -1 or preset not in FAMILY:
        return [(given.get("stage", 0), given)]
    own, plain = relative(given), {k: v for k, v in given.items() if k != "recipe"}
    stages = [(n, plain) for n in range("teacher" in given, max(1, min(own, default=4)))]
    stages += [(n, given) for n in own]
    numbers, usual = [n for n, _ in stages], WAN_RECIPES.get(preset, {1: {}})[1]
    settings = {"ode_context": "real", **usual, **own.get(1, {}), **given}
    if 1 in numbers and settings["ode_context"] == "real":
        one = numbers.index(1)
        stages[one] = 1, {k: v for k, v in stages[one][1].items() if k != "teacher"}
        if 0 not in own:
            causal = {k: v for k, v in plain.items() if k != "teacher_forcing"}
            stages.insert(one, (0, {**causal, "recipe": "causal-teacher"}))
    return stages


def control_of(last):
    """Stage 3's control: stage 2 trained on from where it starts, for as many student steps."""
    return dict(tag="control", init=last.init or f"{last.out}/stage2", student_start=0,
                iters=last.iters - last.student_start, stop_spread=0.0)
