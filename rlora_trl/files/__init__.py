"""An adapter on disk: layout, record, tensors, configuration, reading, and the checks of all of them."""
