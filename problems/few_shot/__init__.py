"""Few-shot learning (MAML, implicit MAML)."""
