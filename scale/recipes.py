"""Recipes of the Wan presets: preset -> stage -> what differs from TrainConfig's defaults."""

# Stage 1 has the rates of Causal Forcing, stage 2 those of Self Forcing, stage 3 the paper's.
_RECIPE = {
    0: dict(iters=0),
    1: dict(iters=2000, batch_size=64, lr=2e-6, betas=(0.9, 0.999), trajectories=16_000,
            ode_steps=48, guidance=6.0),
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
