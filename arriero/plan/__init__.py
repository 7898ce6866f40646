"""What a training run will cost, before it is started (`arriero plan`)."""
