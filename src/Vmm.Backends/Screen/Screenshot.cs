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
    /// <param name="surface">The screen.</param>
    /// <param name="to">Where.</param>
    /// <param name="width">About how wide: the picture is shrunk by a whole factor; 0 keeps its size.</param>
    public static void WritePng(IDisplaySurface surface, Stream to, int width = 0)
    {
        ArgumentNullException.ThrowIfNull(surface);
        ArgumentNullException.ThrowIfNull(to);
        var frame = new DisplayFrame();
        surface.Refresh(frame);
        int factor = width <= 0 ? 1 : Math.Clamp((frame.Width + (width / 2)) / width, 1, Math.Max(1, Math.Min(frame.Width, frame.Height)));
        PngBuilder png = PngBuilder.Create(frame.Width / factor, frame.Height / factor, hasAlphaChannel: false);
        for (int y = 0; y < frame.Height / factor; y++)
        {
            for (int x = 0; x < frame.Width / factor; x++)
            {
                uint colour = Average(frame, x * factor, y * factor, factor);
                png.SetPixel((byte)(colour >> 16), (byte)(colour >> 8), (byte)colour, x, y);
            }
        }

        png.Save(to);
    }

    // The mean of a square of pixels.
    private static uint Average(DisplayFrame frame, int left, int top, int size)
    {
        uint red = 0, green = 0, blue = 0;
        for (int y = top; y < top + size; y++)
        {
            foreach (uint colour in frame.Pixels.AsSpan((y * frame.Width) + left, size))
            {
                red += (colour >> 16) & 0xFF;
                green += (colour >> 8) & 0xFF;
                blue += colour & 0xFF;
            }
        }

        uint count = (uint)(size * size);
        return ((red / count) << 16) | ((green / count) << 8) | (blue / count);
    }

    /// <summary>The screen as lines of text, or null when it is not in a text mode.</summary>
    public static string[]? ReadText(IDisplaySurface surface)
    {
        ArgumentNullException.ThrowIfNull(surface);
        return surface.ReadText()?.ToLines();
    }
}
