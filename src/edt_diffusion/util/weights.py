"""What identifies a network: a digest of its weights."""

import hashlib

import torch


def weights_sha256(network: torch.nn.Module) -> str:
    """Return the SHA-256 of a network's class name and weights as 64 hexadecimal digits.

    It covers every tensor by name, shape and value in float32, and neither device, file format nor stored precision: a
    float16 file and its float32 copy have the same one.
    """
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"\n{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).data)
    return digest.hexdigest()
