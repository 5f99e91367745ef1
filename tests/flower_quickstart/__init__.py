"""An app in the form of Flower's PyTorch quickstart, on digits that come with scikit-learn; the README's diff is applied to it."""
