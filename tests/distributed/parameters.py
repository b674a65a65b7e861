"""Whether two runs have come to the same parameters."""

import torch


def assert_same(found, expected, atol=1e-6):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=1e-4, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )
