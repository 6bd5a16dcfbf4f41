"""One run seed in, one independent seed per purpose out."""

import hashlib


def derive_seed(run_seed: int, purpose: str, *indices: int | str) -> int:
    """A seed in [0, 2**31) for one purpose, e.g. derive_seed(0, "rollout", step, prompt_id).

    The same arguments give the same seed on every machine and in every process; different
    purposes never share a random stream.
    """
    key = "/".join([str(run_seed), purpose, *(str(index) for index in indices)])
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "little") >> 1
