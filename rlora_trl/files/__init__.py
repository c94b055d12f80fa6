"""An adapter on disk: names of its files, its record, tensors and configuration, and the checks of all of them."""
