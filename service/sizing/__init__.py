"""How many replicas a traffic needs, and what they cost: a calculator, and a simulation that checks it."""
