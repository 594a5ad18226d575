"""Other weights for a running application, and generations under way as others act on them."""
