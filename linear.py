"""What is linear in the small VAE: the goal that its encoder is trained towards, and the encoder as two matrices. Ours, not the paper's.

train_vae.py asks for latents like principal_components'; chunks.py then encodes with LinearCodec what is cut out anew at every draw.

Shapes: B batch, T pixel frames, F = 1 + (T-1)/4 latents, h = H/8, w = W/8, C channels; 768 = 3 * 4 * 8 * 8 numbers of a block of pixels.
"""
import torch


def blocks(video):
    """(B, 3, T, H, W) -> (B, F, h, w, 3 * 4 * 8 * 8): the pixels one latent stands for; the first frame counts four times."""
    v = torch.cat([video[:, :, :1].expand(-1, -1, 3, -1, -1), video], 2)        # (B, 3, 4F, H, W)
    v = v.unflatten(4, (-1, 8)).unflatten(3, (-1, 8)).unflatten(2, (-1, 4))     # (B, 3, F, 4, h, 8, w, 8)
    return v.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def spread(x, channels):
    """Centred vectors (n, P) -> (P, channels), their first principal components, mixed so that every channel has variance 1.

    Component i has variance v_i; it is scaled to v_i^(1/2): half-way between pixels' weights (1: a diffusion model would
    see little but brightness) and white (0: it would spend itself on grain). A Hadamard matrix, orthogonal and all of +-1, spreads the
    components, so that a latent of mean 0 and standard deviation 1 is what the DiT gets."""
    variance, basis = torch.linalg.eigh(x.T @ x / len(x))                       # ascending
    variance, basis = variance[-channels:], basis[:, -channels:]
    hadamard = torch.ones(1, 1)
    while len(hadamard) < channels:                                             # Sylvester's construction: channels is a power of two
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    return basis * variance ** -0.25 @ hadamard / variance.sqrt().sum().sqrt()


def within(x):
    """Blocks (..., 3 * 4 * 8 * 8) -> what changes in them: less the mean of their four frames."""
    x = x.unflatten(-1, (3, 4, 64))
    return (x - x.mean(-2, keepdim=True)).flatten(-3)


def principal_components(batches, channels, moving=0, first=None):
    """Videos -> a function (B, 3, T, H, W) -> (B, C + moving, F, h, w): the best *linear* codec of blocks of 4 x 8 x 8 pixels, and of what moves.

    It is a goal worth giving to the encoder. Without it two hours of training stayed 4 dB below plain principal components; and a projection
    done twice is the same projection, which is what a video that is decoded and encoded again at every chunk needs.
    But lips that open and shut within four frames are little of all that pixels do, and 16 components give them away: the next ones, `moving`
    of them, are of change alone, of what the first C leave of it. first: (B, 3, T, H, W) -> (B, C, F, h, w), to be used in place of the first C."""
    x = torch.cat([blocks(v).flatten(0, 3) for v in batches])                   # (n, 768)
    mean = x.mean(0)
    if first is None:
        matrix = spread(x - mean, channels)                                     # (768, C)
        first = lambda video: ((blocks(video) - mean) @ matrix).movedim(-1, 1)
    z = torch.cat([first(v).movedim(1, -1).flatten(0, 3) for v in batches])     # (n, C)
    offset = z.mean(0)
    square, product = ((z - offset).T @ y for y in (z - offset, x - mean))
    decode = torch.linalg.solve(square, product)                                # (C, 768), least squares
    left = lambda x, z: within(x - mean - (z - offset) @ decode)                # (..., 768)
    motion = spread(left(x, z), moving) if moving else None                     # (768, moving)

    def goal(video):
        z = first(video)
        return torch.cat([z, (left(blocks(video), z.movedim(1, -1)) @ motion).movedim(-1, 1)], 1) if moving else z
    return goal


class LinearCodec:
    """The encoder as two matrices: of a picture's blocks, 4 x 8 x 8 pixels each, and of those that follow. Least squares over some clips.

    The small VAE's encoder was trained towards principal components, so this is nearly all of it: 1 part in 100 of a latent's variance is
    missing, 6 of the motion of a puppet's mouth (LOG.md). 4 ms for 33 frames instead of 330: a clip can be cut out anew at every draw."""

    @torch.no_grad()
    def __init__(self, vae, videos, device="cpu"):
        """videos: (1, 3, T, H, W) each; device: the VAE's. -> .matrices; .missing, the share of these latents' variance that they do not give."""
        square, product, total = [torch.eye(769).double() for _ in range(2)], [0.0, 0.0], [0.0, 0.0]
        for video in videos:
            pair = blocks(video), vae.encode(video.to(device)).cpu().movedim(1, -1)
            for i, part in enumerate((slice(0, 1), slice(1, None))):            # the first latent is special: see vae.py
                x, y = (z[:, part].flatten(0, 3).double() for z in pair)
                x = torch.cat([x, torch.ones(len(x), 1)], 1)                    # (n, 769)
                square[i], product[i], total[i] = square[i] + x.T @ x, product[i] + x.T @ y, total[i] + y.square().sum(0)
        found = [torch.linalg.solve(s, p) for s, p in zip(square, product)]     # (769, C)
        rest = sum((t - (w * (p + w)).sum(0)).sum() for t, w, p in zip(total, found, product))      # + w: of the 1 on the diagonal
        variance = sum((t - p[-1].square() / (s[-1, -1] - 1)).sum() for t, p, s in zip(total, product, square))    # last row: sums, and how many
        self.matrices, self.missing = [w.float() for w in found], (rest / variance).item()

    def encode(self, video):
        """(1, 3, T, H, W) -> (C, F, h, w)"""
        x = blocks(video)[0]                                                    # (F, h, w, 768)
        z = [part @ matrix[:-1] + matrix[-1] for part, matrix in zip((x[:1], x[1:]), self.matrices)]
        return torch.cat(z).movedim(-1, 0)

    def still(self, picture, F):
        """z_id, Eq. 3: (1, 3, 1, H, W) -> (C, F, h, w). Its first latent, and one for all others: without a memory they are equal."""
        two = self.encode(picture.expand(-1, -1, 5, -1, -1))                    # (C, 2, h, w)
        return torch.cat([two[:, :1], two[:, 1:].expand(-1, F - 1, -1, -1)], 1)
