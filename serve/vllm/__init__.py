"""How vLLM loads and runs 2:4 checkpoints. Only `serve.vllm_plugin` imports what imports vLLM."""
