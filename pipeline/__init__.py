"""SOLAR training: soft-token alignment for cross-lingual reasoning under DeepSpeed ZeRO-3."""
