"""The models' functions work where peft, bitsandbytes, adapters and transformers cannot be imported."""

from __future__ import annotations

from tests.test_imports import BLOCK, python

CODE = """
import tempfile, torch, peftrt
from torch import nn

torch.manual_seed(0)
with tempfile.TemporaryDirectory() as folder:
    def build():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
    x = torch.randn(3, 64)
    config = peftrt.LoraConfig(r=2, target_modules=["0"], modules_to_save=["2"])
    for quantize in (None, "nf4"):
        model = build()
        assert "lora_linear" in str(peftrt.adapt(model, config, name="fr", quantize=quantize))
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1e-3)
        before = model(x).detach()
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        assert model(x).square().sum() < before.square().sum()
        peftrt.save(model, f"{folder}/{quantize}", name="fr")
        other = build()
        peftrt.adapt(other, peftrt.LoraConfig(target_modules=["0"]), name="it", quantize=quantize)
        peftrt.load(other, f"{folder}/{quantize}", name="fr")
        with peftrt.rows(other, ["fr", None, "fr"]):
            mixed = other(x)
        peftrt.set_active(other, "fr")
        assert torch.equal(other(x), model(x))
        assert torch.allclose(mixed[::2], model(x)[::2], atol=1e-6)
        assert not torch.allclose(mixed[1], model(x)[1], atol=1e-6)
        peftrt.export(model, f"{folder}/dense-{quantize}", dtype=torch.float32)
        dense = build()
        import safetensors.torch
        dense.load_state_dict(safetensors.torch.load_file(f"{folder}/dense-{quantize}/model.safetensors"))
        assert torch.allclose(dense(x), model(x), atol=1e-5)
        peftrt.explain(model)
import sys
assert not {"peft", "bitsandbytes", "adapters", "transformers"} & {name.partition(".")[0] for name in sys.modules}
print("alone")
"""


def test_models_without_the_peers() -> None:
    assert python(BLOCK + CODE) == "alone"
