"""How much training the image demo needs to a level of its held-out reward, by each method."""
