"""Items of one replica's requests, processed by others of the render tier."""
