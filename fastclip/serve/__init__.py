"""The web page of an image search, and the JSON that it is made of."""
