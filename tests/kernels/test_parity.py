"""Every backend against the float64 truth, under the derived error budget."""

import pytest
import torch
from hypothesis import given
from support.harness import check_case
from support.strategies import DTYPES, cases


@given(cases())
def test_any_call_is_within_the_budget(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    check_case(logits, labels, keywords, backend)


@given(cases(center="one", level="token", reduction="token-mean"))
def test_the_one_pass_route_is_within_the_budget(kernels, device, case):
    logits, labels, keywords = case.tensors(device)
    check_case(logits, labels, keywords, kernels)


@given(cases(layout="padded", extra={"inplace": True}))
def test_in_place_is_within_the_budget(backend, device, case):
    logits, labels, keywords = case.tensors(device)
    check_case(logits, labels, keywords, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [0.37, -3.0])
def test_an_upstream_gradient_scales(backend, device, dtype, upstream):
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 50, device=device).to(dtype)
    labels = torch.randint(0, 50, (3, 4), device=device)
    old_logps = torch.full((3, 4), -4.0, device=device)
    keywords = {"old_logps": old_logps, "advantages": torch.randn(3, device=device)}
    check_case(logits, labels, keywords, backend, upstream)
