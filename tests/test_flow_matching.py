"""The loss is the one that the pipelines' denoising loop undoes: same forward, same timestep, same schedule."""

import gc
import math
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from unit_parts import losses_of, predict, start_run

FAMILIES = {"dev": Flux2Pipeline, "klein": Flux2KleinPipeline}
SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")


def arguments(script, *flags: str) -> object:
    """The parsed command line without its checks."""
    return script.build_parser().parse_args(list(flags))


def with_random_lora(script, run) -> torch.nn.Module:
    """The transformer with a LoRA whose every matrix is random, so that it changes every output."""
    transformer = script.load_transformer(run)
    torch.manual_seed(0)
    for parameter in script.add_lora(run, transformer).values():
        torch.nn.init.normal_(parameter, std=0.2)
    return transformer.eval()


@pytest.fixture(scope="module")
def models(tiny, tiny_klein) -> dict:
    """The model folders by family."""
    return {"dev": tiny, "klein": tiny_klein}


def denoise(script, run, transformer, family: str, guidance: float, size: tuple[int, int], steps: int = 2) -> list:
    """(inputs, output, sigma) of every call that the installed pipeline makes to the transformer."""
    calls = []
    hook = transformer.register_forward_hook(
        lambda _, args, kwargs, output: calls.append((dict(kwargs), output[0])), with_kwargs=True
    )
    pipeline = script.make_pipeline(run, transformer, script.load_vae(run))
    assert type(pipeline) is FAMILIES[family]
    generator = torch.Generator().manual_seed(3)
    options = {"guidance_scale": guidance, "num_inference_steps": steps, "output_type": "latent"}
    if family == "klein":
        options["negative_prompt_embeds"] = torch.zeros(2, 64, 96, dtype=run.dtype)
    pipeline(
        prompt_embeds=torch.randn(2, 64, 96, generator=generator).to(run.dtype),
        latents=torch.randn(2, 32, size[0] // 16, size[1] // 16, generator=generator),
        height=size[0],
        width=size[1],
        **options,
    )
    hook.remove()
    assert len(calls) == steps
    return [(inputs, output, sigma) for (inputs, output), sigma in zip(calls, pipeline.scheduler.sigmas, strict=False)]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prediction_is_exactly_what_the_denoising_call_computes(script, models, family, precision, tmp_path):
    """For the same noise, sigma, prompt and LoRA: maximum difference 0, in bf16 too, and not on a square."""
    guidance = 3.5 if family == "dev" else 1.0  # above 1 [klein] would mix in a second call
    run = start_run(script, models[family], tmp_path, "--guidance_scale", str(guidance), "--mixed_precision", precision)
    transformer = with_random_lora(script, run)
    for inputs, output, sigma in denoise(script, run, transformer, family, guidance, (48, 80)):
        given = inputs["hidden_states"], sigma.expand(2), inputs["encoder_hidden_states"]
        actual = predict(script, run.args, transformer, *given, 3, 5)
        assert actual.shape == (2, 15, 32) and actual.dtype == run.dtype
        assert (actual - output).abs().max() == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_input_of_the_transformer_is_the_pipelines(script, models, family, precision, tmp_path):
    """The bf16 timestep takes the pipeline's rounding; [klein] gets no guidance, [dev] the scale in fp32."""
    guidance = 3.5 if family == "dev" else 1.0
    run = start_run(script, models[family], tmp_path, "--guidance_scale", str(guidance), "--mixed_precision", precision)
    transformer = script.load_transformer(run)
    ours = []
    calls = denoise(script, run, transformer, family, guidance, (64, 32), steps=6)
    transformer.register_forward_pre_hook(lambda _, args, kwargs: ours.append(kwargs), with_kwargs=True)
    for inputs, _, sigma in calls:
        given = inputs["hidden_states"], sigma.expand(2), inputs["encoder_hidden_states"]
        predict(script, run.args, transformer, *given, 4, 2)
    for (theirs, _, _), mine in zip(calls, ours, strict=True):
        for name in ("hidden_states", "timestep", "guidance", "encoder_hidden_states"):
            if theirs[name] is None:
                assert mine[name] is None, name
            else:
                assert mine[name].dtype == theirs[name].dtype and mine[name].equal(theirs[name]), name
        for name in ("txt_ids", "img_ids"):  # the transformer reads the first sample's
            assert mine[name][0].equal(theirs[name][0]), name
    assert (ours[0]["guidance"] is None) == (family == "klein")


def test_the_lora_and_the_sigma_and_the_prompt_matter(script, tiny, tmp_path):
    """Without this the parity above could hold between constants."""
    run = start_run(script, tiny, tmp_path)
    transformer = with_random_lora(script, run)
    noisy, embeds = torch.randn(1, 4, 32), torch.randn(1, 64, 96)

    def velocity(sigma=0.5, prompt=embeds):
        return predict(script, run.args, transformer, noisy, torch.tensor([sigma]), prompt, 2, 2)

    base = velocity()
    assert not velocity(sigma=0.6).allclose(base, atol=1e-4) and not velocity(prompt=-embeds).allclose(base, atol=1e-4)
    transformer.disable_adapters()
    assert not velocity().allclose(base, atol=1e-4)


# ---- the loss ----


class Knows(torch.nn.Module):
    """A transformer that knows the answer: it returns `velocity` and remembers what it was given."""

    config = SimpleNamespace(guidance_embeds=False)

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity, self.inputs = velocity, {}

    def forward(self, **inputs) -> tuple[torch.Tensor]:
        self.inputs = inputs
        return (self.velocity,)


def problem(batch: int = 3, rows: int = 2, columns: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """(clean tokens, noise), drawn."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(batch, rows * columns, 32, generator=generator) for _ in range(2))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_perfect_predictor_has_loss_zero(script, scheme):
    """The target is noise - x_0, under every weighting; sigma 0 and 1 are no exception."""
    clean, noise = problem()
    args, sigmas = arguments(script, "--weighting_scheme", scheme), torch.tensor([0.0, 0.3, 1.0])
    losses = losses_of(script, args, Knows(noise - clean), clean, noise, sigmas, 2, 5)
    assert losses.tolist() == [0.0, 0.0, 0.0]


def test_the_loss_is_the_mean_square_of_each_sample_in_fp32(script):
    """Not of the batch, and not rounded to bf16 when the model answers in bf16."""
    clean, noise = problem()
    error = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    answer = Knows(noise - clean + error)
    losses = losses_of(script, arguments(script), answer, clean, noise, torch.full([3], 0.5), 2, 5)
    assert losses.tolist() == pytest.approx([0, 1, 4], abs=1e-6)
    rounded = Knows((noise - clean).bfloat16())
    losses = losses_of(script, arguments(script), rounded, clean, noise, torch.full([3], 0.5), 2, 5)
    assert losses.dtype == torch.float32 and 0 < losses.max() < 1e-4


def test_the_model_sees_the_mix_of_image_and_noise(script):
    """x_t = (1 - sigma) x_0 + sigma noise, and the timestep sigma."""
    clean, noise = problem()
    model, sigmas = Knows(noise), torch.tensor([0.0, 0.25, 1.0])
    losses_of(script, arguments(script), model, clean, noise, sigmas, 2, 5)
    noisy = model.inputs["hidden_states"]
    assert noisy[0].equal(clean[0]) and noisy[2].equal(noise[2])
    assert noisy[1].allclose(0.75 * clean[1] + 0.25 * noise[1])
    assert model.inputs["timestep"].allclose(sigmas)


def test_one_euler_step_along_the_target_returns_the_image(script, tiny, tmp_path):
    """With the scheduler that the pipeline steps with, from any sigma down to 0."""
    scheduler = script.FlowMatchEulerDiscreteScheduler.from_pretrained(tiny / "scheduler")
    clean, noise = problem(1)
    for start in (1.0, 0.7, 0.05):
        scheduler.set_timesteps(sigmas=[start], mu=0.0)
        sigma = scheduler.sigmas[:1]
        assert sigma.item() == pytest.approx(start)
        model = Knows(noise - clean)
        assert losses_of(script, arguments(script), model, clean, noise, sigma, 2, 5).item() == 0
        noisy = model.inputs["hidden_states"]
        back = scheduler.step(noise - clean, scheduler.timesteps[0], noisy, return_dict=False)[0]
        assert (back - clean).abs().max() < 1e-6


# ---- the shift ----


# target tokens -> linear mu and s, empirical mu at 4, 28 and 50 steps
SHIFTS = {
    1024: (0.630, 1.878, {4: 2.031, 28: 1.859, 50: 1.702}),
    2304: (0.847, 2.332, {4: 2.139, 28: 1.981, 50: 1.836}),
    4096: (1.150, 3.158, {4: 2.291, 28: 2.151, 50: 2.023}),
    9216: (2.017, 7.513, {4: 2.017, 28: 2.017, 50: 2.017}),
    16384: (3.230, 25.28, {4: 3.230, 28: 3.230, 50: 3.230}),
}


def shift_of(script, tokens: int, *flags: str) -> float:
    """The s of s*t / (1 + (s-1)*t), from what becomes of t = 1/2."""
    sigma = script.shift_sigmas(arguments(script, *flags), torch.tensor(0.5, dtype=torch.float64), tokens).item()
    return sigma / (1 - sigma)


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("tokens", SHIFTS)
def test_the_shift_has_the_known_values(script, tokens):
    """Linear and empirical, for 512 to 2048 pixels square."""
    mu, factor, empirical = SHIFTS[tokens]
    linear = shift_of(script, tokens)
    assert linear == pytest.approx(factor, rel=1e-3) and math.log(linear) == pytest.approx(mu, abs=6e-4)
    for steps, expected in empirical.items():
        flags = ("--timestep_shift", "empirical", "--num_inference_steps", str(steps))
        assert math.log(shift_of(script, tokens, *flags)) == pytest.approx(expected, abs=6e-4)


@pytest.mark.scripts("t2i")
def test_linear_is_half_at_256_tokens_and_the_shift_can_be_off_or_a_number(script):
    """--timestep_shift none is 1, 3 is 3."""
    assert shift_of(script, 256) == pytest.approx(math.exp(0.5))
    assert shift_of(script, 4096, "--timestep_shift", "none") == 1.0
    assert shift_of(script, 4096, "--timestep_shift", "3") == pytest.approx(3.0)


@pytest.mark.scripts("t2i")
def test_shifted_sigmas_follow_the_schedulers_formula(script, tiny):
    """And keep 0, 1 and their order; without a shift nothing changes."""
    sigmas = torch.linspace(0, 1, 101)
    scheduler = script.FlowMatchEulerDiscreteScheduler.from_pretrained(tiny / "scheduler")
    expected = scheduler.time_shift(1.15, 1.0, sigmas[1:])
    shifted = script.shift_sigmas(arguments(script), sigmas, 4096)
    assert shifted[1:].allclose(expected, atol=1e-6)
    assert shifted[0] == 0 and shifted[-1] == 1 and (shifted.diff() > 0).all() and (shifted[1:-1] > sigmas[1:-1]).all()
    assert script.shift_sigmas(arguments(script, "--timestep_shift", "none"), sigmas, 4096).equal(sigmas)


# ---- u and the weights ----


def drawn(script, count: int, *flags: str) -> torch.Tensor:
    """`count` draws of u, each from a generator of its own, as in training."""
    args = arguments(script, *flags)
    return torch.stack([script.draw_u(args, script.make_generator(0, "sigma", position)) for position in range(count)])


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_u_stays_between_0_and_1_and_comes_from_the_generator(script, scheme):
    """Under every scheme; the global generator has no say."""
    flags = ("--weighting_scheme", scheme, "--mode_scale", "1.29", "--logit_std", "4")
    first = drawn(script, 500, *flags)
    torch.manual_seed(5)
    assert drawn(script, 500, *flags).equal(first)
    assert first.min() >= 0 and first.max() <= 1 and first.std() > 0.1 and first.dtype == torch.float32


@pytest.mark.scripts("t2i")
def test_u_is_clamped_where_the_mode_density_leaves_the_interval(script):
    """A large --mode_scale makes u negative in diffusers: sigma would be above 1."""
    u = drawn(script, 300, "--weighting_scheme", "mode", "--mode_scale", "20")
    assert u.min() == 0 and u.max() == 1


@pytest.mark.scripts("t2i")
def test_uniform_is_the_default_density(script):
    """Mean 1/2, variance 1/12."""
    u = drawn(script, 2000)
    assert abs(u.mean() - 0.5) < 0.02 and abs(u.var() - 1 / 12) < 0.01


@pytest.mark.scripts("t2i")
def test_a_negative_logit_mean_trains_more_on_noise(script):
    """sigma is 1 - u: the sign that the help text states."""
    flags = ("--weighting_scheme", "logit_normal", "--logit_mean")
    assert (1 - drawn(script, 1000, *flags, "-1")).mean() > 0.6
    assert (1 - drawn(script, 1000, *flags, "1")).mean() < 0.4


def weights_of(script, scheme: str, sigmas: torch.Tensor) -> torch.Tensor:
    """The weight of each sample's loss: the losses of a model that is wrong by 1 everywhere."""
    clean, noise = problem(len(sigmas))
    args = arguments(script, "--weighting_scheme", scheme)
    return losses_of(script, args, Knows(noise - clean + 1), clean, noise, sigmas, 2, 5)


@pytest.mark.scripts("t2i")
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_weight_is_finite_and_positive_from_sigma_0_to_1(script, scheme):
    """sigma_sqrt would be infinite at 0."""
    weights = weights_of(script, scheme, torch.linspace(0, 1, 1001))
    assert weights.shape == (1001,) and weights.isfinite().all() and (weights > 0).all() and weights.max() <= 100.001


@pytest.mark.scripts("t2i")
def test_the_weights_have_their_formulas(script):
    """sigma_sqrt is 1 / sigma^2 capped at 100, cosmap 2 / (pi (1 - 2 sigma + 2 sigma^2)), the others 1."""
    sigmas = torch.tensor([0.0, 0.001, 0.1, 0.5, 1.0])
    weights = {scheme: weights_of(script, scheme, sigmas) for scheme in SCHEMES}
    assert weights["sigma_sqrt"].tolist() == pytest.approx([100, 100, 100, 4, 1], rel=1e-5)
    expected = [2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2)) for sigma in sigmas.tolist()]
    assert weights["cosmap"].tolist() == pytest.approx(expected, rel=1e-5)
    for scheme in ("none", "logit_normal", "mode"):
        assert weights[scheme].tolist() == pytest.approx([1.0] * 5)


def test_the_weight_multiplies_the_loss_of_its_own_sample(script):
    """Sample by sample."""
    clean, noise = problem()
    sigmas, args = torch.tensor([0.5, 1.0, 0.05]), arguments(script, "--weighting_scheme", "sigma_sqrt")
    losses = losses_of(script, args, Knows(noise - clean + 1), clean, noise, sigmas, 2, 5)
    assert losses.tolist() == pytest.approx([4, 1, 100], rel=1e-5)


def test_a_micro_batch_is_the_loss_of_its_parts(script, tiny, tmp_path):
    """`batch_losses` shifts sigma by the tokens of the target, encodes, normalises, and asks for the right prompt."""
    run = start_run(script, tiny, tmp_path)
    codec, vae = script.LatentCodec(run), script.load_vae(run)
    pixels, noise, embeds = torch.rand(2, 3, 32, 64) * 2 - 1, torch.randn(2, 8, 32), torch.randn(2, 64, 96)
    clean = script.tokens_from_moments(codec, script.encode_pixels(vae, pixels))
    training = SimpleNamespace(
        codec=codec, transformer=Knows(noise - clean + 2), vae_on_device=lambda run: vae, rest_vae=lambda args: None
    )
    batch = {"target": [(32, 64)] * 2, "u": torch.tensor([0.2, 0.9]), "noise": noise, "pixels": pixels,
             "prompt_embeds": embeds}  # fmt: skip
    batch |= {"references": [[], []]} if script.TASK == "image-to-image" else {}
    losses, sigmas = script.batch_losses(run, training, batch)
    factor = math.exp(0.5 + 0.65 * (8 - 256) / 3840)
    assert sigmas == pytest.approx([factor * s / (1 + (factor - 1) * s) for s in (0.8, 0.1)], rel=1e-5)
    assert losses.tolist() == pytest.approx([4, 4], rel=1e-5)
    cached = {**batch, "moments": script.encode_pixels(vae, batch["pixels"])}
    del cached["pixels"]
    assert script.batch_losses(run, training, cached)[0].equal(losses)


def test_importing_a_script_leaves_the_garbage_collector_on(script):
    assert gc.isenabled()
