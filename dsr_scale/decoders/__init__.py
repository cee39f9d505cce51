"""What training the decoder of a representation autoencoder is made of (docs/method.md §4).

`network` is the decoder, `noise` what its latents are blurred with, `perceptual` and
`discriminator` judge its images, `augment` hides the discriminator's training set from it, and
`adaptive` balances the two losses. Nothing here knows a rank or a loop.
"""
