"""Training in two stages: progressive distillation from a teacher, then supervised fine-tuning."""
