"""What is linear in the small VAE: the target of its encoder, and the encoder as two matrices.

tiny/train_vae.py trains the encoder towards principal_components; tiny/teacher.py encodes clips
that are augmented at every draw with LinearEncoder. Not in the paper.

Shapes: B batch, T pixel frames, F = 1 + (T - 1) / 4 latents, C channels; h = H / (8 patch),
w = W / (8 patch); P = 3 * 4 * 8 * 8 = 768 numbers in a block of pixels, n blocks.
"""
import torch
import torch.nn.functional as nnf

# --------------------------------------------------------------------------- principal components


def blocks(video, patch=1):
    """(B, 3, T, H, W) -> (B, F, h, w, P): the pixels of each latent, or means of patch x patch.

    The first latent has one frame only, which is repeated four times."""
    video = nnf.avg_pool3d(video, (1, patch, patch))
    v = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)        # (B, 3, 4F, H, W)
    v = v.unflatten(4, (-1, 8)).unflatten(3, (-1, 8))
    v = v.unflatten(2, (-1, 4))                                         # (B, 3, F, 4, h, 8, w, 8)
    return v.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def temporal_residual(x):
    """Blocks (..., P) -> what changes within their four frames: the mean frame is subtracted."""
    x = x.unflatten(-1, (3, 4, 64))
    return (x - x.mean(-2, keepdim=True)).flatten(-3)


def hadamard_matrix(size):
    """Orthogonal matrix (size, size) of +1 and -1, by Sylvester's doubling. size: a power of 2."""
    if size & (size - 1):
        raise ValueError(f"{size} channels are no power of two")
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        upper = torch.cat([matrix, matrix], 1)
        lower = torch.cat([matrix, -matrix], 1)
        matrix = torch.cat([upper, lower])
    return matrix


def component_matrix(x, channels):
    """Centred vectors (n, P) -> (P, channels): their first principal components, mixed.

    A component of variance v is scaled to standard deviation v^(1/4). That is half-way between
    v^(1/2), where a diffusion model would see little but brightness, and 1, where it would spend
    itself on noise. A Hadamard matrix then spreads the components evenly over the channels, so
    that each has mean 0 and variance 1."""
    variance, basis = torch.linalg.eigh(x.T @ x / len(x))                       # ascending
    variance, basis = variance[-channels:], basis[:, -channels:]
    mixed = basis * variance ** -0.25 @ hadamard_matrix(channels)
    return mixed / variance.sqrt().sum().sqrt()


def principal_components(batches, channels, motion_channels=0, patch=1):
    """Videos (B, 3, T, H, W) -> function: video -> (B, channels + motion_channels, F, h, w).

    The first `channels` are the best linear code of blocks of 4 x 8 x 8 pixels. They lose most of
    a mouth that opens and shuts within four frames, for it is a small part of the variance. So
    `motion_channels` more code the temporal residual of what the first ones leave.

    Why such a target: without it, two hours of training stayed 4 dB below these components. And
    a projection applied twice is the same projection, which suits a video that is decoded and
    encoded again at every chunk."""
    x = torch.cat([blocks(video, patch).flatten(0, 3) for video in batches])    # (n, P)
    mean = x.mean(0)
    first = component_matrix(x - mean, channels)                                # (P, channels)
    if not motion_channels:
        return lambda video: ((blocks(video, patch) - mean) @ first).movedim(-1, 1)

    z = (x - mean) @ first                                                      # (n, channels)
    offset = z.mean(0)
    square = (z - offset).T @ (z - offset)
    product = (z - offset).T @ (x - mean)
    decode = torch.linalg.solve(square, product)                                # (channels, P)

    def left(x, z):                                                             # (..., P)
        return temporal_residual(x - mean - (z - offset) @ decode)

    motion = component_matrix(left(x, z), motion_channels)

    def encode(video):
        x = blocks(video, patch)
        z = (x - mean) @ first                                                  # (B, F, h, w, .)
        return torch.cat([z, left(x, z) @ motion], -1).movedim(-1, 1)
    return encode

# ------------------------------------------------------------------------------------- the encoder


class LinearEncoder:
    """The VAE's encoder as two matrices, for first and for later latents: least squares on clips.

    The encoder was trained towards principal components, so it is nearly linear: 1 % of a latent's
    variance is missing here, and 6 % of the motion of a synthetic mouth. 33 frames take 4 ms
    instead of 330: a clip can be augmented and encoded at every draw."""

    @torch.no_grad()
    def __init__(self, vae, videos, device="cpu"):
        """videos: (1, 3, T, H, W) each; device: the VAE's. Makes
        .matrices   of first and later latents, each (P + 1, C): the last row is the bias
        .missing    share of the latents' variance on these videos that the matrices do not give"""
        self.patch = vae.config.patch
        square = [torch.eye(769, dtype=torch.float64) for _ in range(2)]        # a little ridge
        product, total = [0.0, 0.0], [0.0, 0.0]
        for video in videos:
            x = blocks(video, self.patch)                                       # (1, F, h, w, P)
            z = vae.encode(video.to(device)).cpu().movedim(1, -1)               # (1, F, h, w, C)
            for i, part in enumerate([slice(0, 1), slice(1, None)]):
                a = x[:, part].flatten(0, 3).double()                           # (n, P)
                a = torch.cat([a, torch.ones(len(a), 1)], 1)                    # (n, P + 1)
                b = z[:, part].flatten(0, 3).double()                           # (n, C)
                square[i] = square[i] + a.T @ a
                product[i] = product[i] + a.T @ b
                total[i] = total[i] + b.square().sum(0)
        found = [torch.linalg.solve(s, p) for s, p in zip(square, product)]
        error, variance = 0.0, 0.0
        for s, p, t, w in zip(square, product, total, found):
            error += (t - (w * (p + w)).sum(0)).sum()                           # + w: of the ridge
            count = s[-1, -1] - 1                                               # of blocks
            variance += (t - p[-1].square() / count).sum()                      # p[-1]: sums of b
        self.matrices = [w.float() for w in found]
        self.missing = (error / variance).item()

    def encode(self, video):
        """(1, 3, T, H, W) -> (C, F, h, w)"""
        first, later = self.matrices
        x = blocks(video, self.patch)[0]                                        # (F, h, w, P)
        z = torch.cat([x[:1] @ first[:-1] + first[-1], x[1:] @ later[:-1] + later[-1]])
        return z.movedim(-1, 0)

    def still(self, picture, F):
        """Eq. 3 for these matrices: (1, 3, 1, H, W) -> z_id (C, F, h, w) of a still video.

        They have no memory, so that all latents but the first are equal."""
        z = self.encode(picture.expand(-1, -1, 5, -1, -1))                      # (C, 2, h, w)
        return torch.cat([z[:, :1], z[:, 1:].expand(-1, F - 1, -1, -1)], 1)
