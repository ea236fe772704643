"""SavedState: how the state of an optimizer in pages leaves it and comes back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

from peftrt.optim import checkpoint, state


class SavedState(torch.optim.Optimizer):
    """What ``PagedAdamW`` offers to whoever saves it; a subclass has what ``peftrt.optim.state.Owner`` lists."""

    @property
    def _owner(self) -> state.Owner:
        return cast(state.Owner, self)

    def state_dict(self) -> dict[str, Any]:
        """The state in torch's form, copied to the CPU: ``{"state": {number: {key: tensor}}, "param_groups": [...]}``.

        A Parameter with a state of 32 bits has ``exp_avg`` and ``exp_avg_sq``, fp32 of its own shape, which
        ``torch.optim.AdamW`` loads. One of 8 bits has its codes, ``exp_avg_q`` and ``exp_avg_sq_q``, uint8 of its
        shape, and their scales, ``exp_avg_absmax`` and ``exp_avg_sq_absmax``, fp32 [ceil(n / 256)]. ``step`` is fp32
        []. One that never had a gradient is absent.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        saved = state.state_dict(self._owner)
        for after in self._optimizer_state_dict_post_hooks.values():
            saved = after(self, saved) or saved
        return saved

    def to_fp32(self) -> dict[str, Any]:
        """``state_dict`` with the moments of every Parameter in fp32, for ``torch.optim.AdamW``."""
        return state.to_fp32(self.state_dict())

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state dict of ``torch.optim.AdamW``, of ``PagedAdamW`` or of bitsandbytes' AdamW, 32 or 8 bits.

        Codes are copied as they are where the Parameter's state has 8 bits here too; else moments are quantised or
        dequantised. Groups take over what the saved ones name, as in torch; Parameters without a saved state have none
        after. A poisoned optimizer is good again.

        Args:
            state_dict: with tensors on any device; it is left as it is.

        Raises:
            ValueError: groups, a shape, dtype or key do not fit, or amsgrad or maximize is on; nothing is changed.
            OSError: the file behind the pages cannot be written; the optimizer is poisoned until another load.
        """
        saved = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            saved = before(self, saved) or saved
        state.load_state_dict(self._owner, saved)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def save(self, path: str | os.PathLike[str], extra: Mapping[str, Tensor] | None = None) -> None:
        """Write the state as of the last step to a safetensors file, whole or not at all.

        What was at ``path`` is there until the new file is on the disk, whatever fails. The state is streamed: one
        Parameter's moments are in memory at a time. The file ends with a checksum of all of it.

        Args:
            path: the file; its directory must exist. A symbolic link is replaced, and what it leads to is left alone.
            extra: tensors of the same step by name, such as the Parameters themselves.

        Raises:
            TypeError: ``extra`` does not map names to tensors, or a group has a value that JSON cannot hold.
            FormatError: ``path`` is a directory or has a name that ``load`` refuses, or a tensor cannot be written.
            OSError: the disk is full or cannot be written.
        """
        checkpoint.save(self._owner, path, extra)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Tensor]:
        """Take over what ``save`` wrote, whatever budget, pages and bits it had; as ``load_state_dict`` does it.

        The file is read twice: for its checksum, and, once all is checked, page by page.

        Args:
            path: the file.

        Returns:
            ``extra`` as it was given to ``save``, on the CPU.

        Raises:
            MissingFileError: there is no such file.
            FormatError: it is damaged, none of ``save``'s, or of other groups or shapes; nothing is changed.
            OSError: it, or the file behind the pages, cannot be read or written.
        """
        return checkpoint.load(self._owner, path)
