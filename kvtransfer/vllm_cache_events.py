"""Changes of vLLM's prefix cache, as the worker's process reads them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored
from vllm.v1.core.kv_cache_utils import make_block_hash_with_group_id

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockHashToBlockMap


def told(event: Any, block_tokens: int, held: BlockHashToBlockMap, group: int) -> list[Any] | None:
    """One change of a group's blocks; None for blocks that no later prompt can hit.

    Keys, first parent, tokens, salt and adapter of what is stored; keys of what is removed; `[]`
    when all is gone. Blocks with an image or an embedding in them are left out, and so what follows
    them: their tokens do not say which.

    vLLM may have one block several times (it computes a prompt's last one again though it is there)
    and tells of the end of each. What is still `held` after the step is not removed.
    """
    match event:
        case AllBlocksCleared():
            return []
        case _ if event.group_idx not in (None, group):
            return None
        case BlockRemoved():
            keys = event.block_hashes
            gone = [
                key
                for key in keys
                if not held.get_one_block(make_block_hash_with_group_id(key, group))
            ]
            return [gone] if gone else None
        # Where blocks are skipped (sliding windows), tokens and hashes do not go together.
        case BlockStored() if len(event.token_ids) == len(event.block_hashes) * block_tokens:
            extras = event.extra_keys or [None] * len(event.block_hashes)
            plain = [all(isinstance(e, str) for e in extra or ()) for extra in extras]
            count = plain.index(False) if False in plain else len(plain)
            names = [e for e in extras[0] or () if isinstance(e, str)]
            salts = names[1:] if event.lora_name else names
            return [
                event.block_hashes[:count], event.parent_block_hash,
                event.token_ids[: count * block_tokens], salts[0] if salts else None,
                event.lora_name,
            ] if count else None  # fmt: skip
    return None
