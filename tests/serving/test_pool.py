"""AdapterPool: what each row of a batch is served with, and where the adapters are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from peftrt.formats.errors import AdapterNameError, ConfigError, FormatError, NonFiniteError, UnsupportedError
from peftrt.serving import AdapterPool, AdapterTooLargeError, UnknownAdapterError
from tests.adapters.tiny import assert_unchanged, state_of
from tests.serving.tenants import Tower, bytes_of, check, inputs, is_empty, make_pool, serve, some, write
from tests.tolerances import assert_close, assert_same_bits


def test_each_row_is_served_with_its_own_adapter(tmp_path: Path) -> None:
    tenants = {
        "plain": write(tmp_path / "a", 1),
        "one layer": write(tmp_path / "b", 2, targets=["second"]),
        "rslora": write(tmp_path / "c", 3, r=11, use_rslora=True),
        "dora": write(tmp_path / "d", 4, r=3, use_dora=True),
        "large": write(tmp_path / "e", 5, r=33),
    }
    pool = make_pool(device_budget="1MiB")
    for name, tenant in tenants.items():
        assert pool.load(name, tenant.path).r == tenant.config["r"]
    assert pool.names == tuple(tenants)
    assert "dora" in pool
    assert "other" not in pool
    check(pool, tenants, [*tenants, None])
    check(pool, tenants, ["large", None, "plain", "large", "plain"])
    for name in tenants:
        check(pool, tenants, [name])
    check(pool, tenants, [None])


def test_a_mixed_batch_equals_each_adapter_s_share_of_it_bit_for_bit(tmp_path: Path) -> None:
    """Neighbours with other adapters, DoRA's among them, change no bit of a row."""
    tenants = {**some(tmp_path, 3), "dora": write(tmp_path / "d", 4, use_dora=True)}
    pool = make_pool(device_budget="1MiB")
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    names = ["t0", "dora", None, "t1", "t2"]
    x = inputs(5)
    mixed = serve(pool, names, x)
    for row, name in enumerate(names):
        alone = serve(pool, [name if i == row else None for i in range(5)], x)
        assert_same_bits(alone[row], mixed[row])


def test_equals_load_and_set_active(tmp_path: Path) -> None:
    tenants = {**some(tmp_path, 2), "dora": write(tmp_path / "d", 4, use_dora=True)}
    pool, other = make_pool(device_budget="1MiB"), Tower()
    x = inputs(2)
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
        peftrt.load(other, tenant.path, name=name)
        peftrt.set_active(other, name)
        with torch.no_grad():
            assert_close(serve(pool, [name, name], x), other.eval()(x), roundings=4)


def test_adapters_are_kept_in_the_dtype_of_the_weights(tmp_path: Path) -> None:
    tenant = write(tmp_path / "a", 1)
    model = Tower().bfloat16()
    with AdapterPool(model, device_budget="1MiB", host_budget="1MiB") as pool:
        pool.load("a", tenant.path)
        x = inputs(2).bfloat16()
        with torch.no_grad(), pool.batch(["a", None]):
            result = model(x)
        assert pool.stats().device_bytes_used == bytes_of(4) // 2
        rounded = copy.copy(tenant.tensors)
        tenant.tensors.update({key: value.bfloat16().float() for key, value in rounded.items()})
        peftrt.load(other := Tower().bfloat16(), tenant.path)
        peftrt.set_active(other, "default")
        with torch.no_grad():
            assert_close(result[:1], other(x[:1]), roundings=8)
    with AdapterPool(Tower().bfloat16(), device_budget="1MiB", host_budget="1MiB", dtype=torch.float16) as pool:
        large = write(tmp_path / "large", 1)
        key = next(iter(large.tensors))
        large.tensors[key][0, 0] = 1e5
        peftrt.formats.safe.write_tensors(tmp_path / "large" / "adapter_model.safetensors", large.tensors)
        with pytest.raises(NonFiniteError, match=r"beyond the range of torch\.float16"):
            pool.load("large", large.path)


def test_over_a_quantised_base(tmp_path: Path) -> None:
    tenant = write(tmp_path / "a", 1)
    model = Tower()
    peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules="all-linear"), name="own", quantize="nf4")
    x = inputs(2)
    with torch.no_grad():
        peftrt.set_active(model, None)
        base = model(x)
        peftrt.set_active(model, "own")
    with AdapterPool(model, device_budget="1MiB", host_budget="1MiB") as pool:
        pool.load("a", tenant.path)
        pool.load("own", tenant.path)  # a name of the pool's says nothing of the model's adapter
        with torch.no_grad(), pool.batch(["a", None]):
            mixed = model(x)
        with torch.no_grad(), pool.batch(["own", None]):
            assert_same_bits(model(x), mixed)
    assert_close(mixed[1], base[1], roundings=4)
    peftrt.load(model, tenant.path, name="again")
    peftrt.set_active(model, "again")
    with torch.no_grad():
        assert_close(mixed[0], model(x)[0], roundings=4)


def test_layers_that_are_no_sites_compute_their_base(tmp_path: Path) -> None:
    tenant = write(tmp_path / "a", 1, targets=["second"])
    model = Tower()
    peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False), name="a")
    base = Tower()
    with AdapterPool(model, device_budget="1MiB", host_budget="1MiB", target_modules=["second"]) as pool:
        pool.load("a", tenant.path)
        pool.model = base  # type: ignore[attr-defined]
        x = inputs(2)
        with torch.no_grad(), pool.batch(["a", None]):
            result = model(x)
        with torch.no_grad():
            assert_close(result[1], base(x)[1], roundings=4)
        with pytest.raises(UnsupportedError, match="'first' is not among the pool's target_modules"):
            pool.load("b", write(tmp_path / "b", 1).path)


def test_the_model_s_own_embeddings_and_saved_modules_stay_out_of_it(tmp_path: Path) -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.tower, self.head = nn.Embedding(7, 16), Tower(), nn.Linear(16, 3)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.tower(self.table(ids)))

    model, ids = Words(), torch.arange(6).view(2, 3)
    with torch.no_grad():
        base = model(ids)
    config = {"r": 2, "target_modules": ["table", "first"], "modules_to_save": ["head"], "init_lora_weights": False}
    peftrt.adapt(model, peftrt.LoraConfig(**config), name="a")  # type: ignore[arg-type]
    pool = AdapterPool(model, device_budget="1MiB", host_budget=0, target_modules=["first", "second"])
    tenant = write(tmp_path / "a", 1, targets=["second"])
    for key in [key for key in tenant.tensors if "second" in key]:
        tenant.tensors[key.replace("second", "tower.second")] = tenant.tensors.pop(key)
    peftrt.formats.safe.write_tensors(tenant.path / "adapter_model.safetensors", tenant.tensors)
    pool.load("a", tenant.path)
    with torch.no_grad(), pool.batch(["a", None]):
        result = model(ids)
    assert_close(result[1], base[1], roundings=4)
    assert not torch.allclose(result[0], base[0])


def test_device_bytes_are_within_five_percent_of_the_ranks_rounded_up(tmp_path: Path) -> None:
    pool = make_pool(device_budget="4MiB")
    wanted = 0
    for i, r in enumerate((1, 7, 8, 9, 16, 31, 64, 200)):
        pool.load(f"t{i}", write(tmp_path / str(i), i, r=r).path)
        pool.pin(f"t{i}")
        wanted += bytes_of(r)
    assert wanted <= pool.stats().device_bytes_used <= 1.05 * wanted


def test_beams_and_lengths(tmp_path: Path) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool()
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    x = inputs(6)
    with torch.no_grad(), pool.batch(["t0", None, "t1"], expand=2):
        whole = pool.model(x)  # type: ignore[attr-defined]
        last = pool.model(x[:, -1:])  # type: ignore[attr-defined]
        once = pool.model(x[::2])  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="6 names for a batch whose leading dimension is 4"):
            pool.model(x[:4])  # type: ignore[attr-defined]
    assert_close(once, whole[::2])
    assert_close(whole, serve(pool, ["t0", "t0", None, None, "t1", "t1"], x))
    assert_close(last, whole[:, -1:])


def test_blocks_within_blocks_and_outside_of_them(tmp_path: Path) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool()
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    base = serve(pool, [None, None])
    with torch.no_grad(), pool.batch(["t0", "t0"]):
        check(pool, tenants, ["t1", None])
        inner = pool.model(inputs(2))  # type: ignore[attr-defined]
    assert_same_bits(inner, serve(pool, ["t0", "t0"]))
    with torch.no_grad():
        assert_close(pool.model(inputs(2)), base)  # type: ignore[attr-defined]


def test_two_pools_of_one_model_know_nothing_of_each_other(tmp_path: Path) -> None:
    tenants = some(tmp_path, 2)
    pool = make_pool()
    model = pool.model  # type: ignore[attr-defined]
    other: Any = AdapterPool(model, device_budget="1MiB", host_budget="1MiB")
    other.model = model
    pool.load("it", tenants["t0"].path)
    other.load("it", tenants["t1"].path)
    with torch.no_grad(), pool.batch(["it", "it"]):
        check(other, {"it": tenants["t1"]}, ["it", None])
        inner = model(inputs(2))
    assert_same_bits(inner, serve(pool, ["it", "it"]))
    other.close()
    check(pool, {"it": tenants["t0"]}, ["it", None])


def test_gradients_reach_the_input_and_a_backward_runs_nothing_again(tmp_path: Path) -> None:
    pool = make_pool()
    pool.load("a", write(tmp_path / "a", 1).path)
    x = inputs(2).requires_grad_()
    with pool.batch(["a", None]):
        y = torch.utils.checkpoint.checkpoint(pool.model, x, use_reentrant=False)  # type: ignore[attr-defined]
        direct = pool.model(x)  # type: ignore[attr-defined]
    direct.sum().backward()
    assert x.grad is not None
    with pytest.raises(RuntimeError, match="a pool serves"):
        y.sum().backward()


def test_unknown_name_never_serves_the_base(tmp_path: Path) -> None:
    pool = make_pool()
    pool.load("a", write(tmp_path / "a", 1).path)
    for names in (["b"], ["a", "A"], ["a", "b", None]):
        with pytest.raises(
            UnknownAdapterError, match=f"no adapter {names[-1] or names[1]!r} is loaded; the pool knows 1"
        ):
            serve(pool, names)
    for call in (pool.unload, pool.pin, pool.unpin):
        with pytest.raises(UnknownAdapterError, match="no adapter 'b' is loaded"):
            call("b")
    assert pool.stats().in_flight == 0
    for names, error in (([], ValueError), ("a", TypeError), ([7], TypeError), ([["a"]], TypeError)):
        with pytest.raises(error, match="names must"):
            serve(pool, names)
    with pytest.raises(ValueError, match="expand must"):
        serve(pool, ["a"], expand=0)


def test_what_a_pool_cannot_serve_is_refused_by_name(tmp_path: Path) -> None:
    pool = make_pool(max_rank=16)
    for name, changes, error, message in (
        ("..", {}, AdapterNameError, "must not contain"),
        ("a/b", {}, AdapterNameError, "must not contain"),
        ("rank", {"r": 17}, AdapterTooLargeError, "'first' has rank 17, the pool's max_rank is 16"),
        ("other", {"target_modules": ["third"]}, FormatError, "'first' has tensors, but the configuration does not"),
        ("saved", {"modules_to_save": ["third"]}, UnsupportedError, r"modules_to_save \(third\)"),
        ("lora bias", {"lora_bias": True}, UnsupportedError, "lora_bias"),
        ("bias", {"bias": "all"}, UnsupportedError, "bias"),
        ("method", {"peft_type": "LOHA"}, UnsupportedError, "LOHA"),
    ):
        tenant = write(tmp_path / "bad", 1, **changes)
        with pytest.raises(error, match=message):
            pool.load(name, tenant.path)
    assert pool.names == ()
    assert not pool._reserved
    with pytest.raises(AdapterTooLargeError, match=r"takes \d+ bytes on the device, the pool has 64"):
        make_pool(device_budget=64).load("a", write(tmp_path / "a", 1).path)


def test_paths_are_confined_to_the_root(tmp_path: Path) -> None:
    inside = write(tmp_path / "root" / "a", 1)
    outside = write(tmp_path / "b", 2)
    (tmp_path / "root" / "link").symlink_to(outside.path)
    pool = make_pool(root=tmp_path / "root")
    pool.load("a", inside.path)
    for path in (outside.path, tmp_path / "root" / "link", tmp_path / "root" / ".." / "b"):
        with pytest.raises(AdapterNameError, match="leads out of"):
            pool.load("b", path)
    assert pool.names == ("a",)


def test_a_model_that_cannot_be_served_is_as_it_was() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 16)
            self.tower = Tower()

    def principal() -> nn.Module:
        model = Tower()
        peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa"), name="p")
        return model

    def merged() -> nn.Module:
        model = Tower()
        peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules="all-linear"), name="m")
        peftrt.merge(model)
        return model

    for make, options, error, message in (
        (Tower, {"target_modules": ["third"]}, ConfigError, "'third' matches no module"),
        (Words, {"target_modules": ["first", "table"]}, UnsupportedError, "table is an embedding"),
        (principal, {}, UnsupportedError, "first: an adapter that began with PiSSA"),
        (merged, {}, ValueError, "merged"),
        (Tower, {"device_budget": 63}, ValueError, "device_budget must be at least 64"),
        (Tower, {"device_budget": "2 apples"}, ValueError, "device_budget must be like"),
        (Tower, {"device_budget": None}, TypeError, "device_budget must be"),
        (Tower, {"host_budget": -1}, ValueError, "host_budget must not be negative"),
        (Tower, {"max_adapters": 0}, ValueError, "max_adapters must be"),
        (Tower, {"max_rank": True}, ValueError, "max_rank must be"),
        (Tower, {"dtype": torch.int8}, TypeError, "dtype must be fp32"),
        (lambda: Tower().double(), {}, UnsupportedError, r"weight of torch\.float64"),
        (Tower, {"device_budget": "1000000TiB"}, RuntimeError, "memory|size"),
    ):
        model: Any = make()
        before = state_of(model)
        with pytest.raises(error, match=message):
            AdapterPool(model, **{"device_budget": "1MiB", "host_budget": 0, **options})
        assert_unchanged(model, before)


def test_a_model_with_pissa_since_is_an_error_when_it_is_called(tmp_path: Path) -> None:
    pool = make_pool()
    pool.load("a", write(tmp_path / "a", 1).path)
    config = peftrt.LoraConfig(r=2, target_modules="all-linear", init_lora_weights="pissa")
    peftrt.adapt(pool.model, config, name="p")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="were taken out"):
        serve(pool, ["a"])


def test_sizes_are_read(tmp_path: Path) -> None:
    for size, nbytes in ((1 << 16, 1 << 16), ("64KiB", 1 << 16), ("0.5 MiB", 1 << 19), ("100", 64)):
        assert make_pool(device_budget=size).stats().device_bytes_free == nbytes


def test_stats_are_for_programs_people_and_prometheus(tmp_path: Path) -> None:
    tenants = some(tmp_path, 3)
    pool = make_pool(adapters=2)
    for name, tenant in tenants.items():
        pool.load(name, tenant.path)
    pool.pin("t0")
    check(pool, tenants, ["t0", "t1"])
    with pool.batch(["t0", "t2"]):
        stats = pool.stats()
    assert stats.as_dict() == {
        **stats.as_dict(),
        "adapters_known": 3,
        "adapters_on_host": 3,
        "adapters_on_device": 2,
        "pinned": 1,
        "in_flight": 2,
        "batches": 1,
        "device_bytes_used": 2 * bytes_of(4),
        "device_bytes_free": 0,
        "device_bytes_largest_hole": 0,
        "host_bytes_used": 3 * bytes_of(4),
        "hits": 2,
        "loads": 3,
        "evictions": 1,
        "reloads_from_disk": 0,
        "rejected_busy": 0,
        "load_count": 3,
    }
    assert 0 < stats.load_seconds_max <= stats.load_seconds_sum
    text = stats.prometheus()
    assert "# TYPE peftrt_pool_loads_total counter\npeftrt_pool_loads_total 3\n" in text
    assert "# TYPE peftrt_pool_in_flight gauge\npeftrt_pool_in_flight 2\n" in text
    assert text.count("\n") == 3 * len(stats.as_dict())
    assert "hits: 2" in str(stats)
    assert (pool.stats().in_flight, pool.stats().batches) == (0, 0)


def test_a_closed_pool_leaves_a_model_that_computes_its_base(tmp_path: Path) -> None:
    with make_pool() as pool:
        slots = pool._slots
        pool.load("a", write(tmp_path / "a", 1).path)
        pool.pin("a")
        slab = slots.slab
    assert not slab.any()
    assert slots.slab.numel() == 0
    pool.close()
    with torch.no_grad():
        assert_close(pool.model(inputs(2)), Tower()(inputs(2)), roundings=4)  # type: ignore[attr-defined]
    for call in (lambda: serve(pool, ["a"]), lambda: pool.load("b", tmp_path / "a")):
        with pytest.raises(peftrt.serving.PoolClosedError, match="the pool was closed"):
            call()
    assert pool.stats().adapters_known == 0
    assert is_empty(slots)
