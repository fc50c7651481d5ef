"""Token weights of the reconstruction loss, and the contrastive loss of volumes and their auxiliary images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from mmmae_kernels.dispatch import in_debug_mode

from ..config import MMMAEConfig
from .inputs import first_sample, is_distributed
from .resize import resize

VALID_SHARE = 0.3  # a token with a smaller share of valid pixels does not count in the reconstruction loss


def token_weights(config: MMMAEConfig, valid: Tensor, ids_predicted: Tensor) -> Tensor:
    """Return the weights of tokens in the reconstruction loss: 1 for tokens with enough valid pixels, else 0.

    Args:
        config: of the model.
        valid: `[B, H, W]` bool.
        ids_predicted: `[B, M']`, the tokens.

    Returns:
        `[B, M']` float32.
    """
    _, rows, columns = config.grid
    share = F.avg_pool2d(resize(valid.to(torch.float32), config.image_size)[:, None], config.patch[1:])
    enough = (share >= VALID_SHARE).to(torch.float32).flatten(1)  # [B, h*w]
    return enough.gather(1, ids_predicted % (rows * columns))


def contrastive_loss(
    config: MMMAEConfig, queries: Tensor, vectors: Mapping[str, Tensor], presence: Mapping[str, Tensor]
) -> Tensor:
    """Compute InfoNCE (van den Oord et al., 2018) of each sample against the auxiliary vectors of all ranks' samples.

    Args:
        config: its `temperature` divides the cosine similarities; with `symmetric`, vectors are contrasted against
            queries too, and the loss is the mean of both directions, as in CLIP.
        queries: `[B, D]`, one for each sample.
        vectors: name -> `[B, D]`, of the modalities that at least one sample of this rank has.
        presence: name -> bool `[B]`; a sample without the modality is neither query nor negative.

    Returns:
        The mean over the modalities that at least one sample has, or 0 if there is none. Under torch.distributed, the
        mean over the ranks of this loss is the loss of the joined batch, and the same holds for the gradients.
    """
    # Every rank takes part in every gather, forward and backward, even for modalities that only other ranks have.
    names = [name for name in config.aux if is_distributed() or name in vectors]
    if not names:
        return queries.new_zeros(())
    if is_distributed():
        _check_batches(queries)
    absent = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    keys = torch.stack([vectors[name] if name in vectors else queries * 0.0 for name in names], dim=1)  # [B, m, D]
    has = torch.stack([presence[name] if name in vectors else absent for name in names], dim=1)  # [B, m]
    with torch.autocast(queries.device.type, enabled=False):
        query, key, all_has = _unit(queries), _unit(keys), _of_all_ranks(has)
        logits = torch.einsum("bd,amd->mba", query, _of_all_ranks(key))
        loss = _cross_entropy(logits / config.temperature, has, all_has)
        if config.symmetric:
            logits = torch.einsum("bmd,ad->mba", key, _of_all_ranks(query))
            loss = (loss + _cross_entropy(logits / config.temperature, has, all_has)) / 2
        ranks = len(all_has) // len(has)
        loss = loss * ranks / all_has.sum(0).clamp(min=1)
        return loss.sum() / all_has.any(0).sum().clamp(min=1)


def _check_batches(queries: Tensor) -> None:
    """Raise ValueError if batch sizes differ between ranks; on GPUs, where it has to wait, only in debug mode."""
    if queries.device.type == "cpu" or in_debug_mode():
        sizes = _of_all_ranks(torch.tensor([len(queries)], device=queries.device)).tolist()
        if len(set(sizes)) > 1:
            raise ValueError(f"the ranks have batches of {sizes} samples, expected the same size on all ranks")


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.to(torch.promote_types(vectors.dtype, torch.float32)), dim=-1)


def _cross_entropy(logits: Tensor, has: Tensor, all_has: Tensor) -> Tensor:
    """Sum the cross-entropy over this rank's samples that have the modality, `[m]`.

    Args:
        logits: `[m, B, A]`, of this rank's samples against those of all ranks.
        has, all_has: bool `[B, m]` and `[A, m]`, which samples have the modality.
    """
    # Rows of samples without the modality become 0 before the softmax: rows of -inf give NaN in backward.
    logits = logits.masked_fill(~all_has.T[:, None, :], float("-inf")).masked_fill(~has.T[:, :, None], 0.0)
    modalities, batch, _ = logits.shape
    own = torch.arange(batch, device=logits.device) + first_sample(batch)
    losses = F.cross_entropy(logits.transpose(1, 2), own.expand(modalities, batch), reduction="none")
    return losses.masked_fill(~has.T, 0.0).sum(1)


def _of_all_ranks(local: Tensor) -> Tensor:
    """Concatenate `[B, ...]` of all ranks in rank order, differentiably; B must be the same on all ranks."""
    if not is_distributed():
        return local
    from .collectives import gather

    gathered: Tensor = gather(local)
    return gathered
