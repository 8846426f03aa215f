"""The KV handoff: who may read which blocks, and how the bytes move."""
