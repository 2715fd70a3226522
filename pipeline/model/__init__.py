"""The language model: loading, the map of its blocks, running parts of it, generation."""

from pipeline.offered import offered

__getattr__, __all__ = offered(
    __name__,
    {
        "activations": ("Activations", "target_logits", "target_losses"),
        "blocks": ("Block", "find_blocks", "sizes"),
        "generation": ("generate",),
        "llm": ("LLM",),
        "loading": ("load_model",),
    },
)
