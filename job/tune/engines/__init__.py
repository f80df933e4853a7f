"""What computes gradients: autograd or the hand-written step, and the parts that both are made of."""
