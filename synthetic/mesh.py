"""The face mesh of the synthetic clips: point indices and two functions of it.

Indices are those of MediaPipe's 468-point face mesh. Rows run from the left to the right of the
picture. "inner" edges of the lips touch when the mouth is shut.
"""
import numpy as np

UPPER_LIP_INNER = [78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308]
LOWER_LIP_INNER = [78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308]
UPPER_LIP_OUTER = [61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291]
LOWER_LIP_OUTER = [61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291]
EYE_CORNERS = [33, 133], [362, 263]
EYES = (    # (upper, lower) edge of each eye
    ([33, 246, 161, 160, 159, 158, 157, 173, 133], [33, 7, 163, 144, 145, 153, 154, 155, 133]),
    ([362, 398, 384, 385, 386, 387, 388, 466, 263], [362, 382, 381, 380, 374, 373, 390, 249, 263]),
)
BROWS = (   # (upper, lower) edge of each brow
    ([70, 63, 105, 66, 107], [46, 53, 52, 65, 55]),
    ([336, 296, 334, 293, 300], [285, 295, 282, 283, 276]),
)
OVAL = [    # outline of the face
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
]


def smoothstep(x, a, b):
    """0 up to a, 1 from b on, a cubic between; falling if a > b."""
    t = np.clip((x - a) / (b - a), 0, 1)
    return t * t * (3 - 2 * t)


def relief(points, x, y, width=0.11):
    """Depth of the face at x, y (h, w): kernel regression of points (468, 3). Returns (h, w).

    Outside of the face, the depth of its edge goes on.
    """
    distance2 = (x[..., None] - points[:, 0]) ** 2 + (y[..., None] - points[:, 1]) ** 2
    nearest = distance2.min(-1, keepdims=True)
    weight = np.exp(-(distance2 - nearest) / (2 * width ** 2))      # (h, w, 468)
    return (weight * points[:, 2]).sum(-1) / weight.sum(-1)
