"""Attention over the paged KV cache, reached by stock model code through AttentionInterface."""
