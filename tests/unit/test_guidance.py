"""Multi-domain guidance (Eq. 6) and the special cases that it must equal."""

import pytest
import torch
from einops import rearrange

from dreamdance.diffusion.guidance import classifier_free_guidance, multi_domain_guidance


def predictions(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """Random predictions for 2 clips, 2 frames and 3 domains."""
    generator = torch.Generator().manual_seed(0)
    conditional, unconditional = (torch.randn(12, 4, 3, 5, generator=generator).to(dtype) for _ in range(2))
    return conditional, unconditional


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_zero_scales_give_the_conditional_prediction(dtype):
    conditional, unconditional = predictions(dtype)
    assert torch.equal(multi_domain_guidance(conditional, unconditional, (0, 0, 0)), conditional)
    assert torch.equal(classifier_free_guidance(conditional, unconditional, 1.0), conditional)


def test_equal_scales_are_plain_guidance_of_one_more():
    conditional, unconditional = predictions(torch.float64)
    for scale in (0.5, 1.0, 2.5):
        plain = unconditional + (1 + scale) * (conditional - unconditional)
        torch.testing.assert_close(multi_domain_guidance(conditional, unconditional, (scale,) * 3), plain)
        torch.testing.assert_close(classifier_free_guidance(conditional, unconditional, 1 + scale), plain)


def test_each_domain_has_its_own_scale_and_domains_are_innermost():
    conditional, unconditional = predictions(torch.float64)
    scales = (2.5, 1.0, 1.5)
    guided = rearrange(multi_domain_guidance(conditional, unconditional, scales), "(k m) ... -> m k ...", m=3)
    for domain, scale in enumerate(scales):
        e = rearrange(conditional, "(k m) ... -> m k ...", m=3)[domain]
        e_uncond = rearrange(unconditional, "(k m) ... -> m k ...", m=3)[domain]
        torch.testing.assert_close(guided[domain], e + scale * (e - e_uncond))


def test_permuting_domains_and_scales_permutes_the_result():
    conditional, unconditional = predictions()
    order = [2, 0, 1]

    def permute(x: torch.Tensor) -> torch.Tensor:
        return rearrange(rearrange(x, "(k m) ... -> k m ...", m=3)[:, order], "k m ... -> (k m) ...")

    scales = torch.tensor([2.5, 1.0, 1.5])
    guided = multi_domain_guidance(permute(conditional), permute(unconditional), scales[order])
    assert torch.equal(guided, permute(multi_domain_guidance(conditional, unconditional, scales)))


def test_agreeing_predictions_need_no_guidance():
    conditional, _ = predictions()
    assert torch.equal(multi_domain_guidance(conditional, conditional, (3, 2, 1)), conditional)
    assert torch.equal(classifier_free_guidance(conditional, conditional, 7.5), conditional)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_predictions_are_guided_in_float32_and_keep_their_type(dtype):
    conditional, unconditional = predictions(dtype)
    exact = multi_domain_guidance(conditional.double(), unconditional.double(), (2.5, 1.0, 1.5))
    guided = multi_domain_guidance(conditional, unconditional, (2.5, 1.0, 1.5))
    assert guided.dtype == dtype
    # one rounding, at the end: within half a unit in the last place, and a little for float32's own
    assert torch.all((guided.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6)
    plain = classifier_free_guidance(conditional, unconditional, 2.5)
    assert plain.dtype == dtype
    exact = classifier_free_guidance(conditional.double(), unconditional.double(), 2.5)
    assert torch.all((plain.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-6)


def test_predictions_that_do_not_fit_are_refused():
    conditional, unconditional = predictions()
    with pytest.raises(ValueError, match="m=5"):
        multi_domain_guidance(conditional, unconditional, (1,) * 5)
    with pytest.raises(ValueError, match="one shape"):
        multi_domain_guidance(conditional, unconditional[:6], (1, 1, 1))
    with pytest.raises(ValueError, match="m=0"):
        multi_domain_guidance(conditional, unconditional, ())
    with pytest.raises(ValueError, match="guidance of predictions"):
        classifier_free_guidance(conditional, unconditional[:6], 2.0)
