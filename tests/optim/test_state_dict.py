"""state_dict and load_state_dict: torch's form, 8-bit codes, conversions; what does not fit changes nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from peftrt.formats.adamw_state import BLOCK, EXP_AVG_MAP, EXP_AVG_SQ_MAP, dequantize, quantize
from peftrt.optim import PagedAdamW
from peftrt.optim.state import to_fp32
from tests.optim.stateful import EMPTY, IDLE, PAGE, SHAPES, bits_of, everything, make, parameters, train

LARGE = [number for number, shape in enumerate(SHAPES) if torch.Size(shape).numel() >= 4096]


def torch_adamw(params: list[nn.Parameter], **options: Any) -> torch.optim.AdamW:
    groups = [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "weight_decay": 0.1}]
    return torch.optim.AdamW(groups, **options)


def test_the_form_is_torchs() -> None:
    saved = make().state_dict()
    params = parameters()
    peer = torch_adamw(params)
    train(params, peer, range(3))
    expected = peer.state_dict()
    assert list(saved["state"]) == [number for number in range(len(SHAPES)) if number not in (EMPTY, IDLE)]
    del expected["state"][EMPTY]
    for number, entry in expected["state"].items():
        assert saved["state"][number].keys() == entry.keys()
        for key, value in entry.items():
            assert saved["state"][number][key].dtype == value.dtype
            torch.testing.assert_close(saved["state"][number][key], value, rtol=1e-5, atol=1e-7)
    for group, peers in zip(saved["param_groups"], expected["param_groups"], strict=True):
        assert {key: peers[key] for key in ("params", "lr", "betas", "eps", "weight_decay")} == {
            key: group[key] for key in ("params", "lr", "betas", "eps", "weight_decay")
        }


def test_a_state_dict_is_a_copy() -> None:
    optimizer = make()
    saved = optimizer.state_dict()
    before = bits_of(saved)
    train(list(optimizer.parameters), optimizer, range(3, 5))
    assert bits_of(saved) == before
    assert bits_of(optimizer.state_dict()) != before


def test_torchs_default_dtype_does_not_matter() -> None:
    optimizer = make(bits=8)
    expected = bits_of([optimizer.state_dict(), optimizer.to_fp32()])
    torch.set_default_dtype(torch.float64)
    try:
        assert bits_of([optimizer.state_dict(), optimizer.to_fp32()]) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_eight_bits_keep_their_codes() -> None:
    saved = make(bits=8).state_dict()["state"]
    for number, entry in saved.items():
        size = torch.Size(SHAPES[number])
        if number not in LARGE:
            assert entry.keys() == {"step", "exp_avg", "exp_avg_sq"}
            continue
        blocks = -(-size.numel() // BLOCK)
        assert {key: (value.dtype, value.shape) for key, value in entry.items()} == {
            "step": (torch.float32, ()),
            "exp_avg_q": (torch.uint8, size),
            "exp_avg_sq_q": (torch.uint8, size),
            "exp_avg_absmax": (torch.float32, (blocks,)),
            "exp_avg_sq_absmax": (torch.float32, (blocks,)),
        }


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("page_size", [PAGE, 4 * PAGE, 1 << 20])
def test_loaded_into_other_pages_it_is_the_same_bits(bits: int, page_size: int) -> None:
    source = make(bits=bits)
    saved = source.state_dict()
    params = [nn.Parameter(parameter.detach().clone()) for parameter in source.parameters]
    # what lay there before is gone, also where the saved state has none
    other = make(bits=bits, page_size=page_size, params=params, steps=0)
    train(params, other, range(50, 52), idle=None)
    other.load_state_dict(saved)
    for parameter, original in zip(params, source.parameters, strict=True):
        parameter.data.copy_(original.data)
    assert bits_of(other.state_dict()) == bits_of(saved)
    assert other.steps.tolist() == source.steps.tolist()
    train(list(source.parameters), source, range(3, 6), idle=None)
    train(params, other, range(3, 6), idle=None)
    assert everything(other)[2] == everything(source)[2]
    assert bits_of(other.state_dict()) == bits_of(source.state_dict())
    if page_size == PAGE:
        assert everything(other) == everything(source)


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"fused": True}], ids=str)
def test_torch_continues_from_it_and_it_from_torch(options: dict[str, Any]) -> None:
    ours, theirs, through = make(), parameters(), parameters()
    peer = torch_adamw(theirs, **options)
    train(theirs, peer, range(3))
    throughout = torch_adamw(through, **options)
    train(through, throughout, range(6))
    forth = torch_adamw([nn.Parameter(parameter.detach().clone()) for parameter in ours.parameters], **options)
    forth.load_state_dict(ours.state_dict())
    moved = [parameter for group in forth.param_groups for parameter in group["params"]]
    train(moved, forth, range(3, 6))
    back = make(params=theirs, steps=0)
    back.load_state_dict(peer.state_dict())
    train(theirs, back, range(3, 6))
    for expected, one, two in zip(through, moved, theirs, strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(two, expected, rtol=1e-5, atol=1e-6)


def test_through_torch_and_back_not_a_bit_changes() -> None:
    source, other = make(), make(steps=0)
    peer = torch_adamw(parameters())
    peer.load_state_dict(source.state_dict())
    peer.param_groups[0]["capturable"] = True
    other.load_state_dict(peer.state_dict())
    assert bits_of(other.state_dict()["state"]) == bits_of(source.state_dict()["state"])
    assert other.param_groups[0]["capturable"] is True


@pytest.mark.parametrize("step", [7, 7.0, torch.tensor(7), torch.tensor([7.0]), torch.tensor(7.0, dtype=torch.float64)])
def test_steps_in_any_form(step: Any) -> None:
    saved = make().state_dict()
    saved["state"][0]["step"] = step
    other = make(steps=0)
    other.load_state_dict(saved)
    assert other.steps.tolist() == [7, 3, 3, 3, 3, 3, 0, 0, 3]


def test_moments_in_bf16_are_widened() -> None:
    params = parameters(torch.bfloat16)
    peer = torch_adamw(params)
    train(params, peer, range(3))
    other = make(params=parameters(torch.bfloat16), steps=0)
    other.load_state_dict(peer.state_dict())
    for number, entry in other.state_dict()["state"].items():
        for key in ("exp_avg", "exp_avg_sq"):
            expected = peer.state_dict()["state"][number][key]
            assert expected.dtype == torch.bfloat16
            assert bits_of(entry[key]) == bits_of(expected.float())
    assert to_fp32(peer.state_dict())["state"][0]["exp_avg"].dtype == torch.float32


def test_32_bits_are_quantised_and_8_bits_dequantised() -> None:
    exact, codes = make(bits=32).state_dict(), make(bits=8).state_dict()
    down, up = make(bits=8, steps=0), make(bits=32, steps=0)
    down.load_state_dict(exact)
    up.load_state_dict(codes)
    for number in LARGE:
        for key, levels in (("exp_avg", EXP_AVG_MAP), ("exp_avg_sq", EXP_AVG_SQ_MAP)):
            saved, shape = exact["state"][number][key], SHAPES[number]
            expected, scale = quantize(saved.view(-1), levels)
            assert bits_of(down.state_dict()["state"][number][f"{key}_q"]) == bits_of(expected.view(shape))
            assert bits_of(down.state_dict()["state"][number][f"{key}_absmax"]) == bits_of(scale)
            saved = codes["state"][number]
            values = dequantize(saved[f"{key}_q"].view(-1), saved[f"{key}_absmax"], levels)
            assert bits_of(up.state_dict()["state"][number][key]) == bits_of(values.view(shape))
    assert bits_of(up.state_dict()["state"]) == bits_of(to_fp32(codes)["state"])
    assert bits_of(up.state_dict()["state"]) == bits_of(make(bits=8).to_fp32()["state"])


def test_codes_and_scales_of_any_value_are_copied_as_they_are() -> None:
    saved = make(bits=8).state_dict()
    entry = saved["state"][0]
    entry["exp_avg_q"] = torch.randint(0, 256, SHAPES[0], dtype=torch.uint8)
    entry["exp_avg_absmax"][:3] = torch.tensor([float("nan"), float("inf"), -0.0])
    other = make(bits=8, steps=0)
    other.load_state_dict(saved)
    assert bits_of(other.state_dict()) == bits_of(saved)


def test_each_page_is_read_and_written_once(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = make(bits=8)
    calls: list[tuple[str, int]] = []
    for name in ("read_page", "write_page"):
        monkeypatch.setattr(PagedAdamW, name, counted(name, getattr(PagedAdamW, name), calls))
    optimizer.load_state_dict(optimizer.state_dict())
    table = optimizer.table
    empty = {page for page, _ in table.places[IDLE]} - {page for tensor in (5, 8) for page, _ in table.places[tensor]}
    pages = [page for page in range(len(table.pages)) if page not in empty]
    assert len(pages) > 10
    assert calls == [("read_page", page) for page in pages] + [("write_page", n) for n in range(len(table.pages))]


def counted(name: str, method: Any, calls: list[tuple[str, int]]) -> Any:
    def call(self: PagedAdamW, page: int, *args: Any) -> Any:
        calls.append((name, page))
        return method(self, page, *args)

    return call


def test_a_scheduler_goes_on() -> None:
    def scheduled(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[1e-2, 1e-3], total_steps=12)

    through = make(steps=0)
    schedule = scheduled(through)
    for step in range(8):
        train(list(through.parameters), through, range(step, step + 1))
        schedule.step()
        if step == 3:
            saved, saved_schedule = copy.deepcopy(through.state_dict()), schedule.state_dict()
            params = [nn.Parameter(parameter.detach().clone()) for parameter in through.parameters]
    other = make(params=params, steps=0, page_size=2 * PAGE)
    schedule = scheduled(other)
    schedule.load_state_dict(saved_schedule)
    other.load_state_dict(saved)
    assert other.param_groups[0]["initial_lr"] == saved["param_groups"][0]["initial_lr"]
    for step in range(4, 8):
        train(params, other, range(step, step + 1))
        schedule.step()
    assert bits_of(list(other.parameters)) == bits_of(list(through.parameters))
    assert bits_of(other.state_dict()) == bits_of(through.state_dict())


def test_groups_take_over_what_is_saved_and_keep_the_rest() -> None:
    optimizer = make()
    members = [list(group["params"]) for group in optimizer.param_groups]
    optimizer.param_groups[0]["mine"] = 1
    saved = make().state_dict()
    saved["param_groups"][0].update(lr=torch.tensor(0.5), betas=[0.5, 0.75], theirs=[2])
    del saved["param_groups"][1]["eps"]
    optimizer.load_state_dict(saved)
    first, second = optimizer.param_groups
    assert (first["lr"], first["betas"], first["theirs"], first["mine"]) == (0.5, (0.5, 0.75), [2], 1)
    assert second["eps"] == 1e-8
    saved["param_groups"][0]["theirs"].append(3)
    assert first["theirs"] == [2]
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(p) for p in group] for group in members
    ]


def named(order: str = "ab") -> PagedAdamW:
    made = PagedAdamW([(name, nn.Parameter(torch.ones(4))) for name in order], page_size=PAGE)
    train(list(made.parameters), made, range(1))
    return made


def test_names_are_told_and_taken_over() -> None:
    saved = named().state_dict()
    saved["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"parameter 1 \('b'\): exp_avg must be .*float32 of shape \[4\], got .* \[3\]"
    ):
        named().load_state_dict(saved)
    other = named("ab")
    other.load_state_dict(named("xy").state_dict())
    assert other.param_groups[0]["param_names"] == ["x", "y"]
    with pytest.raises(ValueError, match="another order: expected 'a', got 'b'"):
        named("ab").load_state_dict(named("ba").state_dict())


def test_hooks_are_called() -> None:
    optimizer, seen = make(), []
    optimizer.register_state_dict_pre_hook(lambda one: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda one, saved: {**saved, "more": 1})
    optimizer.register_load_state_dict_pre_hook(lambda one, saved: {**saved, "state": {}})
    optimizer.register_load_state_dict_post_hook(lambda one: seen.append("after"))
    saved = optimizer.state_dict()
    assert saved["more"] == 1
    optimizer.load_state_dict(saved)
    assert seen == ["before", "after"]
    assert not optimizer.steps.any()
    assert not any(optimizer.read_page(page).any() for page in range(len(optimizer.table.pages)))


def change(*path: Any, to: Any) -> Callable[[Any], None]:
    def apply(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = to

    return apply


def drop(*path: Any) -> Callable[[Any], None]:
    def apply(saved: Any) -> None:
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return apply


FAULTS: dict[str, tuple[Callable[[Any], None], str]] = {
    "no state": (drop("state"), "expected a state dict"),
    "no groups": (drop("param_groups"), "expected a state dict"),
    "a group fewer": (drop("param_groups", 1), "expected 2 groups, got 1"),
    "a parameter fewer": (drop("param_groups", 1, "params", 0), r"param_groups\[1\]: expected 5 parameters, got 4"),
    "a parameter twice": (change("param_groups", 1, "params", 0, to=3), "once, got 3"),
    "a parameter that is a list": (change("param_groups", 1, "params", 0, to=[]), r"once, got \[\]"),
    "amsgrad": (change("param_groups", 1, "amsgrad", to=True), r"\[1\]: amsgrad=True"),
    "maximize": (change("param_groups", 0, "maximize", to=True), "maximize=True"),
    "Adam's decay": (change("param_groups", 1, "decoupled_weight_decay", to=False), "expected AdamW's weight decay"),
    "a negative rate": (change("param_groups", 0, "lr", to=-1.0), "lr must be"),
    "no number": (change("param_groups", 0, "eps", to="small"), "eps must be"),
    "a NaN decay": (change("param_groups", 0, "weight_decay", to=float("nan")), "weight_decay must be"),
    "a single beta": (change("param_groups", 0, "betas", to=(0.9,)), "betas must be"),
    "a beta of 1": (change("param_groups", 0, "betas", to=(0.9, 1.0)), "betas must be"),
    "state of nobody": (change("state", 99, to={}), "parameter 99 is in none"),
    "no dictionary": (change("state", 8, to=3), "parameter 8: expected a dictionary"),
    "no dictionary inside": (change("state", 8, "__bnb_optimizer_quant_state__", to=3), "must be a dictionary"),
    "state of amsgrad": (change("state", 8, "max_exp_avg_sq", to=torch.zeros(2, 2500)), "amsgrad cannot"),
    "a key too many": (change("state", 8, "momentum_buffer", to=torch.zeros(1)), "parameter 8: expected step with"),
    "a key too few": (drop("state", 8, "exp_avg_sq"), "parameter 8: expected step with"),
    "no step": (drop("state", 8, "step"), "parameter 8: expected step with"),
    "another shape": (change("state", 8, "exp_avg", to=torch.zeros(2500, 2)), r"exp_avg must be .* \[2, 2500\], got"),
    "another size": (change("state", 8, "exp_avg_sq", to=torch.zeros(2, 2501)), "exp_avg_sq must be"),
    "another dtype": (change("state", 8, "exp_avg", to=torch.zeros(2, 2500).double()), "got torch.float64"),
    "no tensor": (change("state", 8, "exp_avg", to=[0.0]), "exp_avg must be a dense tensor with data, got list"),
    "no data": (change("state", 8, "exp_avg", to=torch.zeros(2, 2500, device="meta")), "got torch.strided on meta"),
    "sparse": (change("state", 8, "exp_avg", to=torch.zeros(2, 2500).to_sparse()), "got torch.sparse_coo"),
    "half a step": (change("state", 8, "step", to=1.5), "whole number from 0 on, got 1.5"),
    "steps back": (change("state", 8, "step", to=torch.tensor(-1.0)), "whole number from 0 on"),
    "a NaN of steps": (change("state", 8, "step", to=float("nan")), "whole number from 0 on"),
    "endless steps": (change("state", 8, "step", to=float("inf")), "whole number from 0 on"),
    "two steps": (change("state", 8, "step", to=torch.ones(2)), "whole number from 0 on"),
    "true steps": (change("state", 8, "step", to=True), "whole number from 0 on"),
    "moments of no step": (change("state", 8, "step", to=0), "step is 0, but moments are not"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_changes_nothing(fault: str) -> None:
    apply, message = FAULTS[fault]
    saved = make(steps=5).state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    apply(saved)
    optimizer = make(steps=2)
    before = everything(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert everything(optimizer) == before


def test_no_step_and_zeros_are_no_state() -> None:
    saved = make().state_dict()
    for key in ("exp_avg", "exp_avg_sq", "step"):
        saved["state"][0][key].zero_()
    optimizer = make()
    optimizer.load_state_dict(saved)
    assert optimizer.steps[0] == 0
    assert 0 not in optimizer.state_dict()["state"]


def test_codes_that_lie_crookedly_are_refused() -> None:
    saved = make(bits=8).state_dict()
    saved["state"][0]["exp_avg_q"] = saved["state"][0]["exp_avg_q"].t().contiguous().t()
    with pytest.raises(ValueError, match="must be contiguous"):
        make(bits=8).load_state_dict(saved)


def test_fp32_moments_may_have_any_strides() -> None:
    saved = make().state_dict()
    expected = bits_of(saved)
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].t().contiguous().t()
    optimizer = make(steps=0)
    optimizer.load_state_dict(saved)
    assert bits_of(optimizer.state_dict()) == expected


@given(
    st.lists(st.integers(0, 3000), min_size=1, max_size=8),
    st.sampled_from([32, 8]),
    st.sampled_from([PAGE, 2 * PAGE, 16 * PAGE]),
    st.integers(0, 255),
)
def test_any_sizes_pages_and_parameters_without_state(sizes: list[int], bits: int, page: int, idle: int) -> None:
    def fresh(page_size: int) -> PagedAdamW:
        params = parameters(shapes=[(size,) for size in sizes])
        return PagedAdamW(params, bits=bits, min_8bit_size=700, page_size=page_size)

    source, other = fresh(PAGE), fresh(page)
    for _ in range(2):
        for number, parameter in enumerate(source.parameters):
            parameter.grad = None if idle >> number & 1 else torch.randn(parameter.shape)
        source.step()
    saved = source.state_dict()
    assert list(saved["state"]) == [number for number in range(len(sizes)) if sizes[number] and not idle >> number & 1]
    other.load_state_dict(saved)
    assert bits_of(other.state_dict()) == bits_of(saved)
