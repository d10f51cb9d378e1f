"""What is measured on a GPU, and what is expected there before it is measured."""
