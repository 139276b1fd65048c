import xxhash
from everstep.proto.errors import FormatInvalid


def seal(kind, body, *, repairable=False):
    return (
        b"STUB"
        + (b"R" if repairable else b"P")
        + kind.encode().ljust(12)
        + xxhash.xxh3_128_digest(kind.encode() + body)
        + body
    )


def open_envelope(kind, data, where):
    data = bytes(data)
    if data[:4] != b"STUB" or data[5:17] != kind.encode().ljust(12):
        raise FormatInvalid(where, "not ours")
    if xxhash.xxh3_128_digest(kind.encode() + data[33:]) != data[17:33]:
        raise FormatInvalid(where, "digest")
    return data[33:]
