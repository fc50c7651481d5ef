"""Training steps of a small model on the stub, every launch checked: `python -m tests.emulator.stub_driver.step sm90`.

Prints, as JSON, how often each kernel was started through Triton and by a plan.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Any

import torch

from tests.emulator.stub_driver import install
from tests.emulator.stub_driver.checked import checked


def main(target: str) -> None:
    """Run three steps of each model, of some under autocast; only in the first should kernels lack a plan."""
    driver = install(target)
    import mmmae
    from mmmae_kernels import random_masking, use_backend

    sizes: dict[str, Any] = {"image_size": 32, "dim": 32, "heads": 2, "depth": 2, "aux_dim": 32, "aux_depth": 2}
    sizes |= {"decoder_dim": 32, "decoder_heads": 2, "decoder_depth": 2, "aux_patch": 16}
    first: Counter[str] = Counter()
    planned: Counter[str] = Counter()
    pixels: dict[str, Any] = {"target": "pixels"}
    for options, autocast in (({}, True), (pixels, False), ({**pixels, "normalize_target": True}, True)):
        config = mmmae.MMMAEConfig.preset("base", **sizes, **options)
        model = mmmae.fast_model(config, kernels="triton")
        hsi = torch.randn(2, 1, config.bands, config.image_size, config.image_size)
        aux = {name: torch.randn(2, channels, 32, 32) for name, channels in config.aux.items()}
        valid = torch.ones(2, 32, 32, dtype=torch.bool)
        # Nothing is computed, so that the kernel's tables hold no token numbers: the model is given others.
        mask = random_masking(2, config.tokens, config.keep, seed=0)
        with checked(driver, target) as launches:
            for _ in range(3):
                with use_backend("triton"):
                    random_masking(2, config.tokens, config.keep, seed=0)
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = model(hsi, aux, valid=valid, mask=mask).loss
                loss.backward()
        first += launches.first
        planned += launches.planned
    print(json.dumps({"first": first, "planned": planned, "launches": driver.launches}))


if __name__ == "__main__":
    main(sys.argv[1])
