"""SOLAR training: soft-token alignment for cross-lingual reasoning, with DeepSpeed ZeRO-3."""
