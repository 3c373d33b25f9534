// SPDX-License-Identifier: BSD-2-Clause
using System;
using System.IO;
using BigGustave;
using Vmm.Core;

namespace Vmm.Backends.Screen;

/// <summary>Pictures of a screen for people.</summary>
public static class Screenshot
{
    /// <summary>Writes what the screen shows now as PNG.</summary>
    public static void WritePng(IDisplaySurface surface, Stream to)
    {
        ArgumentNullException.ThrowIfNull(surface);
        ArgumentNullException.ThrowIfNull(to);
        var frame = new DisplayFrame();
        surface.Refresh(frame);
        PngBuilder png = PngBuilder.Create(frame.Width, frame.Height, hasAlphaChannel: false);
        for (int y = 0; y < frame.Height; y++)
        {
            for (int x = 0; x < frame.Width; x++)
            {
                uint colour = frame.Pixels[(y * frame.Width) + x];
                png.SetPixel((byte)(colour >> 16), (byte)(colour >> 8), (byte)colour, x, y);
            }
        }

        png.Save(to);
    }

    /// <summary>The screen as lines of text, or null when it is not in a text mode.</summary>
    public static string[]? ReadText(IDisplaySurface surface)
    {
        ArgumentNullException.ThrowIfNull(surface);
        return surface.ReadText()?.ToLines();
    }
}
