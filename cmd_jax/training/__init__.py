"""Training: one loop for the three stages, which differ in model, loss, frozen parts and preview."""
