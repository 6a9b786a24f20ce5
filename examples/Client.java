import java.awt.image.BufferedImage;
import java.io.ByteArrayOutputStream;
import java.io.File;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Pattern;
import java.util.stream.Collectors;
import java.util.stream.IntStream;
import javax.imageio.ImageIO;

/**
 * Embeds aligned faces from Java 11 and later, without a library: binary tensors both ways.
 *
 * <p>java examples/Client.java http://localhost:8000 crop.png ...
 */
public class Client {
    /** Pixels of a crop as the model wants them: 112 x 112 times B, G, R. */
    static byte[] bgr(BufferedImage crop) {
        if (crop == null || crop.getWidth() != 112 || crop.getHeight() != 112) {
            throw new IllegalArgumentException("expected an aligned crop of 112 x 112 pixels");
        }
        ByteBuffer bytes = ByteBuffer.allocate(112 * 112 * 3);
        for (int rgb : crop.getRGB(0, 0, 112, 112, null, 0, 112)) {
            bytes.put((byte) rgb).put((byte) (rgb >> 8)).put((byte) (rgb >> 16));
        }
        return bytes.array();
    }

    /** Outputs of the model by name, as little-endian bytes. */
    static Map<String, ByteBuffer> infer(String url, List<byte[]> faces) throws Exception {
        int count = faces.size();
        byte[] header = ("{\"inputs\":[{\"name\":\"face\",\"datatype\":\"UINT8\",\"shape\":[" + count + ",112,112,3],"
                + "\"parameters\":{\"binary_data_size\":" + count * 112 * 112 * 3 + "}}],\"outputs\":["
                + "{\"name\":\"embedding\",\"parameters\":{\"binary_data\":true}},"
                + "{\"name\":\"contract\",\"parameters\":{\"binary_data\":true}}]}").getBytes("UTF-8");
        ByteArrayOutputStream body = new ByteArrayOutputStream();
        body.write(header);
        for (byte[] face : faces) {
            body.write(face);
        }
        HttpRequest request = HttpRequest.newBuilder(URI.create(url + "/v2/models/arcface/infer"))
                .header("Inference-Header-Content-Length", String.valueOf(header.length))
                .POST(HttpRequest.BodyPublishers.ofByteArray(body.toByteArray()))
                .build();
        HttpResponse<byte[]> answer = HttpClient.newHttpClient().send(request, HttpResponse.BodyHandlers.ofByteArray());
        if (answer.statusCode() != 200) {
            throw new IllegalStateException(answer.statusCode() + ": " + new String(answer.body(), "UTF-8"));
        }
        int offset = Integer.parseInt(answer.headers().firstValue("Inference-Header-Content-Length").orElseThrow());
        String outputs = new String(answer.body(), 0, offset, "UTF-8");
        Map<String, ByteBuffer> tensors = new HashMap<>();
        var each = Pattern.compile("\"name\":\"(\\w+)\".*?\"binary_data_size\":(\\d+)").matcher(outputs);
        while (each.find()) {
            int size = Integer.parseInt(each.group(2));
            tensors.put(each.group(1), ByteBuffer.wrap(answer.body(), offset, size).order(ByteOrder.LITTLE_ENDIAN));
            offset += size;
        }
        return tensors;
    }

    public static void main(String[] arguments) throws Exception {
        List<byte[]> faces = new ArrayList<>();
        for (int i = 1; i < arguments.length; i++) {
            faces.add(bgr(ImageIO.read(new File(arguments[i]))));
        }
        Map<String, ByteBuffer> tensors = infer(arguments[0], faces);
        var contract = tensors.get("contract").asIntBuffer();  // the weights name themselves: the first 128 bits of their id
        System.out.println("contract " + IntStream.range(0, 4)
                .mapToObj(i -> String.format("%08x", contract.get(i))).collect(Collectors.joining()));
        var embeddings = tensors.get("embedding").asFloatBuffer();
        int width = embeddings.remaining() / faces.size();
        for (int face = 0; face < faces.size(); face++) {
            int start = face * width;
            System.out.println(arguments[face + 1] + " " + IntStream.range(start, start + width)
                    .mapToObj(i -> Float.toString(embeddings.get(i))).collect(Collectors.joining(" ")));
        }
    }
}
