"""Request bodies: strict, and turned into what the renderer and the engines take."""
