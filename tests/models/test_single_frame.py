"""The autoencoder on single frames: values and gradients of the stock one, which is unchanged afterwards."""

import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from uniref_fast.models.single_frame import single_frame
from uniref_fast.testing import max_relative_error

pytestmark = pytest.mark.usefixtures("threads")
# Temporal sampling in other places each: "downsample3d" and "upsample3d" blocks have convolutions of their own.
SHAPES = ([False, True], [True, True], [False, False])


def build(temporal=(False, True), dtype=torch.float32):
    """All weights random, the biases and the taps that see no picture too: a wrong tap changes the numbers."""
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=list(temporal),
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    return vae.to(dtype).eval()


def pixels(batch, height, width, dtype=torch.float32, frames=1):
    generator = torch.Generator().manual_seed(1)
    return (torch.rand(batch, 3, frames, height, width, generator=generator) * 2 - 1).to(dtype)


def results(vae, picture):
    """Moments, decoded picture, and the gradients of a loss over both; by name."""
    picture = picture.clone().requires_grad_()
    posterior = vae.encode(picture).latent_dist
    made = vae.decode(posterior.mode()).sample
    # weights the values apart, so that no two of them can be swapped; and small: decoded values are clamped
    weights = torch.linspace(0.1, 1, made.numel(), dtype=made.dtype).view_as(made)
    loss = (made * weights).square().mean() + posterior.parameters.square().mean()
    wanted = {"picture": picture, **dict(vae.named_parameters())}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    made_up = {"moments": posterior.parameters.detach(), "decoded": made.detach()}
    return made_up | {
        f"d {name}": torch.zeros_like(value) if grad is None else grad
        for (name, value), grad in zip(wanted.items(), grads, strict=True)
    }


@pytest.mark.parametrize("temporal", SHAPES, ids=str)
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 16, 24), (3, 8, 4)])  # wide; smaller than a kernel inside
def test_values_and_gradients_are_those_of_the_stock_model(temporal, batch, height, width):
    """Results agree in float64 to the last digits, in float32 within what rounding makes of that many layers."""
    oracle = results(build(temporal, torch.float64), pixels(batch, height, width, torch.float64))
    for dtype, most in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        vae = build(temporal, dtype)
        with single_frame(vae):
            made = results(vae, pixels(batch, height, width, dtype))
        assert set(made) == set(oracle)
        for name, value in made.items():
            assert value.dtype == dtype and value.shape == oracle[name].shape, name
            assert max_relative_error(value, oracle[name]) <= most, f"{name} in {dtype}"
    for name in ("moments", "decoded", "d picture", "d encoder.conv_in.weight", "d decoder.conv_out.bias"):
        assert made[name].abs().max() > 1e-6, f"{name}: nothing to compare"


def test_taps_that_see_no_picture_have_no_gradient():
    vae = build()
    with single_frame(vae):
        gradient = results(vae, pixels(1, 16, 16))["d encoder.conv_in.weight"]
    assert gradient.shape[2] == 3 and gradient[:, :, -1].abs().sum() > 0 and not gradient[:, :, :-1].any()


@pytest.mark.parametrize("temporal", SHAPES, ids=str)
def test_more_frames_are_refused(temporal):
    vae = build(temporal)
    with single_frame(vae), torch.no_grad():
        with pytest.raises(ValueError, match=r"single frames was given 4"):
            vae.encode(pixels(1, 8, 8, frames=5))
        with pytest.raises(ValueError, match=r"single frames was given 2"):
            vae.decode(torch.zeros(1, 4, 2, 2, 2))
        # what a refused call left behind does not reach the next
        made = vae.decode(torch.zeros(1, 4, 1, 2, 2)).sample
    torch.testing.assert_close(made, vae.decode(torch.zeros(1, 4, 1, 2, 2)).sample)


def state(vae):
    return {name: (set(vars(module)), module.forward) for name, module in vae.named_modules() if name}


def test_everything_is_as_before():
    vae = build()
    before, weights = state(vae), {name: value.clone() for name, value in vae.state_dict().items()}
    clip = pixels(1, 8, 8, frames=5)
    with torch.no_grad():
        expected = vae.encode(clip).latent_dist.mode()
        with single_frame(vae):
            assert state(vae) != before
            vae.encode(clip[:, :, :1])
        assert state(vae) == before
        assert torch.equal(vae.encode(clip).latent_dist.mode(), expected), "video again"
    assert all(torch.equal(value, weights[name]) for name, value in vae.state_dict().items())


def test_everything_is_as_before_after_an_exception():
    vae = build()
    before = state(vae)
    with pytest.raises(KeyError, match="mine"), single_frame(vae):
        raise KeyError("mine")
    assert state(vae) == before


def test_blocks_within_blocks_and_forwards_of_others():
    """A forward that hooks have set on a module is restored, and an inner block does not end the outer one."""
    vae = build()
    calls = []

    def hooked(*arguments):
        calls.append(arguments)
        return type(vae.quant_conv).forward(vae.quant_conv, *arguments)

    vae.quant_conv.forward = hooked
    before = state(vae)
    with single_frame(vae):
        inside = state(vae)
        with single_frame(vae):
            pass
        assert state(vae) == inside
    assert state(vae) == before
    vae.encode(pixels(1, 8, 8))
    assert len(calls) == 1
