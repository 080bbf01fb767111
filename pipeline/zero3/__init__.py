"""DeepSpeed ZeRO-3: the engine, its JSON configuration and its persistent parameters."""
