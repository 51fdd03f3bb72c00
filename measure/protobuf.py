"""Reads the fields of a protobuf message: all that ONNX and MediaPipe files need, no package.

Wire format: https://protobuf.dev/programming-guides/encoding. A field's meaning is in its schema,
onnx.proto or face_geometry's; nested messages are bytes and are read with the same function.
"""


def fields(data):
    """Yield (number, value) of each field of a message; value is an int (varint) or bytes."""
    at = 0

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        number = key >> 3
        wire_type = key & 7
        if wire_type == 0:
            yield number, varint()
        else:
            size = {1: 8, 5: 4}.get(wire_type) or varint()
            yield number, bytes(data[at:at + size])
            at += size


def values(data, number):
    """All values of one field, in the order of the file."""
    return [value for found, value in fields(data) if found == number]
