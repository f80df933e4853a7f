"""How good a model is: answers scored, losses by example and slice, pairs, which checkpoint to keep."""
